"""Procedural tasks: deterministic, disjoint splits, right answers, errors that name the remedy."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sgopd
from sgopd.tasks import load_task, misconceived

TASKS = ["three-sums", "arithmetic", "reasoning-gym:chain_sum"]


def text(example: dict) -> str:
    (message,) = example["prompt"]
    assert message["role"] == "user"
    return message["content"]


@pytest.mark.parametrize("name", TASKS)
def test_an_example_depends_on_split_seed_and_index_alone(name):
    if ":" in name:
        pytest.importorskip("reasoning_gym")
    examples = load_task(name, "train", size=20, seed=3)
    assert load_task(name, "train", size=20, seed=3) == examples
    assert load_task(name, "train", size=8, seed=3) == examples[:8]
    assert load_task(name, "train", size=0, seed=3) == []
    texts = [text(example) for example in examples]
    for other in (load_task(name, "test", size=20, seed=3), load_task(name, "train", size=20, seed=4)):
        assert len(set(texts) & {text(example) for example in other}) < 10
    assert len(set(texts)) > 10


def test_examples_are_the_same_in_every_version():
    """Pinned: the shipped checkpoints never saw this test split; with another hash they would have."""
    assert [text(example) for example in load_task("three-sums", "test", size=3)] == [
        "56+89+36",
        "54+35+29",
        "60+90+56",
    ]
    (example,) = load_task("arithmetic", "train", size=1)
    assert text(example) == r"What is 4 - 4? Put the final answer in \boxed{}."


@pytest.mark.parametrize("name, options", [("three-sums", {}), ("arithmetic", {"operations": "+-*"})])
def test_splits_are_disjoint_whatever_the_seed_and_the_order_of_the_operands(name, options):
    def problems(split):
        return {
            tuple(sorted(re.findall(r"\d+|[-+*](?= )", text(example))))
            for seed in range(3)
            for example in load_task(name, split, size=2000, seed=seed, **options)
        }

    train, test = problems("train"), problems("test")
    assert len(train) > 300 and len(test) > 50
    assert not train & test


def test_three_sums_answers_and_misconceptions():
    examples = load_task("three-sums", size=1000)
    for example in examples:
        addends = [int(number) for number in text(example).split("+")]
        assert len(addends) == 3 and all(10 <= addend <= 99 for addend in addends)
        assert example["answer"] == str(sum(addends))
        assert example["misconceived"] is (misconceived(addends[1]) or misconceived(addends[2]))
    assert 0.34 < sum(example["misconceived"] for example in examples) / 1000 < 0.45  # 32/81 expected


def test_arithmetic_answers_and_options():
    examples = load_task("arithmetic", size=300, operations="+-*", max_operand=12)
    seen = set()
    for example in examples:
        left, operation, right = re.fullmatch(
            r"What is (\d+) ([-+*]) (\d+)\? Put the final answer in \\boxed\{\}\.", text(example)
        ).groups()
        answer = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operation](int(left), int(right))
        assert example["answer"] == str(answer) and answer >= 0
        assert 1 <= int(left) <= 12 and 1 <= int(right) <= 12
        seen.add(operation)
    assert seen == set("+-*")
    assert all("+" in text(example) for example in load_task("arithmetic", size=50, operations="+"))


def test_reasoning_gym_keeps_what_its_scorer_reads():
    reasoning_gym = pytest.importorskip("reasoning_gym")
    for name, options in [("chain_sum", {"max_terms": 3}), ("countdown", {})]:
        for example in load_task(f"reasoning-gym:{name}", size=3, **options):
            assert example["source_dataset"] == name
            assert text(example).startswith(example["question"])
            score = reasoning_gym.get_score_answer_fn(name)
            assert score(example["answer"], example) == 1.0
            assert score("nonsense", example) < 1.0
    terms = [example["metadata"]["num_terms"] for example in load_task("reasoning-gym:chain_sum", max_terms=2)]
    assert set(terms) == {2}


def test_neighbouring_reasoning_gym_seeds_share_no_items():
    pytest.importorskip("reasoning_gym")
    options = {"min_digits": 6, "max_digits": 6}
    runs = [
        {text(example) for example in load_task("reasoning-gym:chain_sum", split, 50, seed, **options)}
        for split, seed in itertools.product(("train", "test"), (0, 1))
    ]
    assert len(set.union(*runs)) == 200


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("three-sum", {}, "there is no task 'three-sum'; did you mean 'three-sums'"),
        ("sorting", {}, "known: arithmetic, reasoning-gym:<dataset>, three-sums"),
        ("reasoning-gym", {}, "did you mean 'reasoning-gym:<dataset>'"),
        ("reasoning-gym:chainsum", {}, "no dataset 'chainsum'; did you mean 'chain_sum'"),
        ("reasoning-gym:chain_sum", {"max_term": 3}, "'max_term'"),
        ("reasoning-gym:chain_sum", {"min_terms": -1}, "min_terms must be positive"),
        ("three-sums", {"digits": 3}, "no option 'digits'; its options: none"),
        (
            "arithmetic",
            {"max_operands": 30},
            "no option 'max_operands'; its options: operations, max_operand",
        ),
        ("arithmetic", {"operations": "+/"}, "operations is '\\+/'"),
        ("arithmetic", {"max_operand": 3}, "max_operand is 3"),
        ("arithmetic", {"split": "validation"}, "split is 'validation'; expected 'train' or 'test'"),
        ("arithmetic", {"size": -1}, "size is -1"),
    ],
)
def test_bad_requests_are_refused_with_the_remedy(name, options, message):
    if ":" in name:
        pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=message):
        load_task(name, **options)


def test_a_missing_reasoning_gym_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ImportError, match="pip install reasoning-gym"):
        load_task("reasoning-gym:chain_sum")


def test_tasks_do_not_import_torch(tmp_path):
    code = "import sys, sgopd.tasks; assert 'torch' not in sys.modules and 'reasoning_gym' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(Path(sgopd.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


# The shipped checkpoints speak three-sums: examples/quickstart/make_checkpoints.py made them.

QUICKSTART = Path(sgopd.__file__).parent / "assets" / "quickstart"
PROMPT = [{"role": "user", "content": "12+34+56"}]
ANSWER = [{"role": "assistant", "content": r"46+56=\boxed{102}"}]


def test_shipped_checkpoints_are_small():
    files = [path for name in ("student", "teacher") for path in (QUICKSTART / name).iterdir()]
    assert {path.name for path in files} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert sum(path.stat().st_size for path in files) < 8e6


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_shipped_tokenizer_renders_a_turn_that_ends_with_eos(name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / name)
    assert len(tokenizer) == 17
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, tokenize=False)
    assert prompt == "<bos>12+34+56="
    turn = tokenizer.apply_chat_template(PROMPT + ANSWER, tokenize=False)
    assert turn == prompt + ANSWER[0]["content"] + tokenizer.eos_token
    ids = tokenizer(turn, add_special_tokens=False).input_ids
    assert [ids[0], ids[-1]] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == turn
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12+34+56=46+56=\\boxed{102}"
    assert tokenizer.tokenize(r"\boxed{7}") == [r"\boxed{", "7", "}"]


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_shipped_models_have_the_accuracy_they_are_shipped_for(name):
    """Wide bands: they catch a wrong file, a template or an alphabet that the models were not trained on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / name)
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / name)
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
    examples = load_task("three-sums", "test", size=128, seed=1)
    prompts = tokenizer.apply_chat_template(
        [example["prompt"] for example in examples], add_generation_prompt=True, return_tensors="pt"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=24, num_return_sequences=16)
    texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [text.endswith(f"\\boxed{{{examples[i // 16]['answer']}}}") for i, text in enumerate(texts)]
    right_QK = torch.tensor(right, dtype=torch.float32).view(128, 16)
    misconceived_Q = torch.tensor([example["misconceived"] for example in examples])
    if name == "student":
        assert 0.14 < right_QK.mean() < 0.28
        assert right_QK.amax(1).mean() > 0.88
    else:
        assert right_QK[~misconceived_Q].mean() > 0.95
        assert 0.03 < right_QK[misconceived_Q].mean() < 0.30
