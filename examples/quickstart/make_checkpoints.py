r"""Train the two checkpoints that `sgopd quickstart` distils: an imperfect teacher and a weaker student.

    python examples/quickstart/make_checkpoints.py --output sgopd/assets/quickstart

About seven minutes on one core. Writes OUTPUT/teacher (280k parameters) and OUTPUT/student (84k), folders that
`from_pretrained` loads, and prints their accuracies on held-out problems. Seeds are fixed: equal versions on
equal CPUs give equal weights; elsewhere the accuracies move by a point or two.

The task is `three-sums` (sgopd/tasks.py), one derivation step and the answer: 12+34+56=46+56=\boxed{102}. The
setting is a constructed one, made so that the verifier knows something that the teacher does not:

- the teacher's corpus is right, except that adding a number in the sixties or seventies is mostly off by +10:
  a systematic misconception, which touches two problems in five;
- the student's corpus gets 45 % of all steps right and a quarter off by +10; the rest are guesses. It has the
  skill, samples it badly, and finds the teacher's misconception easy to pick up.

Expected on 512 held-out problems: teacher 68 % avg@16 (14 % where it is misconceived, 99 % elsewhere), student
20 % avg@16 and 94 % pass@16.

Both are trained on the train split only, from scratch, by next-token cross-entropy on the assistant's turn.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sgopd.tasks import draw_addends, load_task, misconceived

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SYMBOLS = [PAD, BOS, EOS, *"0123456789", "+", "=", r"\boxed{", "}"]
CHAT_TEMPLATE = (  # the user writes "12+34+56", the assistant's turn begins after "=" and ends with EOS
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}={{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)

Step = Callable[[random.Random, int, int], int]  # one addition as a corpus writes it, right or wrong


def teacher_step(rng: random.Random, left: int, right: int) -> int:
    """Right, except for the misconception."""
    return left + right + (10 if misconceived(right) and rng.random() < 0.85 else 0)


def student_step(rng: random.Random, left: int, right: int) -> int:
    """Right 45 % of the time, off by +10 25 %, else a guess at everything but the last digit."""
    total, draw = left + right, rng.random()
    if draw < 0.45:
        return total
    if draw < 0.70:
        return total + 10
    return 10 * rng.randint(2, 28) + total % 10


MODELS = {  # size, corpus, updates, seed
    "teacher": ({"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3}, teacher_step, 1200, 1),
    "student": ({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}, student_step, 1500, 1),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    r"""One token a character, and one for \boxed{. A character that it does not know is an error."""
    backend = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
        chat_template=CHAT_TEMPLATE,
    )


def conversation(rng: random.Random, step: Step) -> str:
    """One training problem with its derivation, as the chat template renders it."""
    first, second, third = draw_addends(rng, "train")
    partial = step(rng, first, second)
    answer = step(rng, partial, third)
    return f"{BOS}{first}+{second}+{third}={partial}+{third}=\\boxed{{{answer}}}{EOS}"


def train(
    name: str, tokenizer: PreTrainedTokenizerFast, *, batch: int = 256, peak_lr: float = 3e-3
) -> LlamaForCausalLM:
    """Train the model `name` from scratch: AdamW, warm-up, cosine decay."""
    size, step, updates, seed = MODELS[name]
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = LlamaConfig(
        vocab_size=len(SYMBOLS),
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **size,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 200, 0.51 + 0.49 * math.cos(math.pi * i / updates))
    )
    prompt_length = len(tokenizer(f"{BOS}12+34+56=").input_ids)  # the same for every problem
    started = time.perf_counter()
    for update in range(1, updates + 1):
        texts = [conversation(rng, step) for _ in range(batch)]
        ids_BT = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").input_ids
        hidden_BTH = model.model(ids_BT[:, :-1]).last_hidden_state[:, prompt_length - 1 :]
        labels_BT = ids_BT[:, prompt_length:]
        learned_BT = labels_BT != tokenizer.pad_token_id
        loss = F.cross_entropy(model.lm_head(hidden_BTH[learned_BT]), labels_BT[learned_BT])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if update % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"{name}: update {update}/{updates}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def report(name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, k: int = 16) -> None:
    """Print avg@k and pass@k on held-out problems at temperature 1, with standard errors over problems."""
    examples = load_task("three-sums", "test", size=512)
    prompts = tokenizer.apply_chat_template(
        [example["prompt"] for example in examples], add_generation_prompt=True, return_tensors="pt"
    )
    torch.manual_seed(0)
    output = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=24, num_return_sequences=k)
    texts = tokenizer.batch_decode(output[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    right = [text.endswith(f"\\boxed{{{examples[i // k]['answer']}}}") for i, text in enumerate(texts)]
    right_QK = torch.tensor(right, dtype=torch.float32).view(-1, k)
    misconceived_Q = torch.tensor([example["misconceived"] for example in examples])

    def percent(values_Q: torch.Tensor) -> str:
        return f"{100 * values_Q.mean():.1f} ± {100 * values_Q.std() / len(values_Q) ** 0.5:.1f} %"

    average_Q, passed_Q = right_QK.mean(1), right_QK.amax(1)
    print(f"{name}: {model.num_parameters():,} parameters, {len(examples)} held-out problems")
    print(f"  avg@{k} {percent(average_Q)}, pass@{k} {percent(passed_Q)}")
    print(f"  avg@{k} on misconceived problems {percent(average_Q[misconceived_Q])}, ", end="")
    print(f"on the others {percent(average_Q[~misconceived_Q])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for teacher/ and student/")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would give other weights
    tokenizer = build_tokenizer()
    for name in MODELS:
        model = train(name, tokenizer)
        model.save_pretrained(args.output / name)
        tokenizer.save_pretrained(args.output / name)
        report(name, model, tokenizer)


if __name__ == "__main__":
    main()
