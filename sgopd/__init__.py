"""SG-OPD: on-policy distillation with a verifier in the loop (arXiv 2606.09304).

The loss lives in `sgopd_kernels`; this package is the loop around it. Command line: `sgopd --help`.
"""

__version__ = "0.1.0"
