"""Tiny random Llama models over characters, so that whole runs take seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+=\\boxed{}? "
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}="


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_tokenizer(characters: str = CHARACTERS, **special: Any) -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "<eos>", "<unk>", *dict.fromkeys(characters)]
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    from tokenizers import decoders

    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)


def make_model(seed: int, width: int = 16, layers: int = 1, vocab_size: int = 32, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "initializer_range": 0.5,  # peaked enough that models differ
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders student/, teacher/ and a data file; `make_model` and `make_tokenizer` for variations."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, seed, width, layers in (("student", 1, 16, 1), ("teacher", 2, 24, 2)):
        make_model(seed, width, layers).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(0, 40, 7)]
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(
        folder=folder,
        student=folder / "student",
        teacher=folder / "teacher",
        data=data,
        make_model=make_model,
        make_tokenizer=make_tokenizer,
    )


@pytest.fixture
def settings(tiny: SimpleNamespace, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings of a run of seconds; keyword arguments change them."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": str(tiny.student),
            "teacher_model_name_or_path": str(tiny.teacher),
            "dataset_name": str(tiny.data),
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "num_threads": 1,
            "verifier": "exact",
            "max_completion_length": 12,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "logging_steps": 2,
            "num_generations_eval": 2,
            "seed": 3,
            **changes,
        }

    return make


class Rule:
    """A verifier that calls a response right if `rule(response)` says so; None is unknown."""

    def __init__(self, rule: Callable[[str], bool | None]) -> None:
        self.rule = rule

    def verify(self, responses: list[str], examples: list[Any], truncated: list[bool]) -> list[Any]:
        from sgopd.verifier import Verdict

        words = {True: (1, "correct"), False: (-1, "incorrect"), None: (0, "unknown")}
        return [Verdict(*words[self.rule(response)], 0.0) for response in responses]


def mixed(response: str) -> bool | None:
    return None if "+" in response else sum(map(ord, response)) % 2 == 0


@pytest.fixture
def trainer(settings: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """A trainer of a run of seconds, with a rule for a verifier until `train` starts its own."""
    from sgopd.config import Config
    from sgopd.trainer import Trainer

    def make(rule: Callable[[str], bool | None] = mixed, **changes: Any) -> Any:
        trainer = Trainer(Config.load(None, settings(**changes)), say=lambda line: None)
        trainer.verifier = Rule(rule)
        return trainer

    return make


@pytest.fixture(scope="session")
def keep_rollouts() -> Callable[..., Path]:
    """Writes completions/ as a run would, with made-up tokens: most of them nearly certain, as a language model's."""
    import numpy
    import pyarrow
    import pyarrow.parquet

    from sgopd.completions import TOKEN_COLUMNS
    from sgopd.report.inspector import QUANTITIES

    def write(folder: Path, count: int, tokens: int, steps: int = 1) -> Path:
        rng = numpy.random.default_rng(0)
        words = [f" {word}" for word in rng.integers(0, 10**6, 20_000)]
        (folder / "completions").mkdir(parents=True)
        for step, rows in enumerate(numpy.array_split(numpy.arange(count), steps), start=1):
            N = len(rows) * tokens
            d = (rng.normal(size=N) * numpy.exp(rng.normal(-3, 2.5, size=N))).clip(-200, 200)
            student_logprob = -numpy.exp(rng.normal(-3, 2.5, size=N))
            entropies = [numpy.exp(rng.normal(-2, 2, size=N)) for _ in range(2)]
            verdict = numpy.array([(-1, 0, 1, 1)[row % 4] for row in rows])
            agreement = numpy.sign(d) * numpy.repeat(verdict, tokens)
            gate = numpy.choose(agreement.astype(int) + 1, (1.0, 1.0, 1.8))
            ids = (rng.zipf(1.3, size=N) % len(words)).astype(int)
            columns = dict(zip(QUANTITIES, (d, d**2 / 2, student_logprob, *entropies, gate)))
            columns |= {"token_id": ids, "token_text": [words[id] for id in ids], "agreement": agreement}
            offsets = numpy.arange(0, N + 1, tokens)

            def split(name: str, values: Any, offsets: Any = offsets) -> pyarrow.Array:
                item = TOKEN_COLUMNS[name].value_type
                values = values.astype("f2") if item == pyarrow.float16() else values
                return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(values).cast(item))

            table = {
                "step": [step] * len(rows),
                "prompt": [f"What is {row} and {row + 1}?" for row in rows],
                "completion": ["left out"] * len(rows),
                "answer": [str(2 * row + 1) for row in rows],
                "extracted": [str(2 * row + 1) if row % 4 > 1 else None for row in rows],
                "verdict": verdict,
                "reason": [("no_answer", "timeout", "correct", "correct")[row % 4] for row in rows],
                "source": ["teacher" if row % 10 == 3 else "student" for row in rows],
                "tokens": [tokens] * len(rows),
                "truncated": [False] * len(rows),
                "gate_verdict": verdict,
                **{name: split(name, values) for name, values in columns.items()},
            }
            path = folder / "completions" / f"step-{step:06d}.parquet"
            pyarrow.parquet.write_table(pyarrow.table(table), path)
        return folder

    return write
