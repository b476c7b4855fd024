from __future__ import annotations

import dataclasses
import datetime
import json
import threading
from decimal import Decimal

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from sgopd.config import Config, UserError
from sgopd.data import Prompts, derive_seed, has_eval_data, load_prompts, take

REQUIRED = {"model_name_or_path": "s", "teacher_model_name_or_path": "t", "output_dir": "o"}


@pytest.fixture
def load(settings, tiny):
    def make(split="train", **changes):
        return load_prompts(Config.load(None, settings(**changes)), tiny.make_tokenizer(), split)

    return make


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_json_lines_and_parquet_read_alike(tmp_path, load):
    rows = [{"question": "1+2=", "gold": 3, "level": 1}, {"question": "4+5=", "gold": 9, "level": 2}]
    parquet = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    columns = {"prompt_column": "question", "answer_column": "gold"}
    lines = load(dataset_name=write(tmp_path / "d.jsonl", rows), **columns)
    table = load(dataset_name=str(parquet), **columns)
    assert lines.examples == table.examples and lines.ids == table.ids
    assert lines.examples[0] == {"question": "1+2=", "gold": 3, "level": 1, "prompt": "1+2=", "answer": "3"}


def test_a_datasets_folder(tmp_path, load):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    write(folder / "test.jsonl", [{"prompt": "2+2=", "answer": "4"}, {"prompt": "3+3=", "answer": "6"}])
    kwargs = {"dataset_kwargs": {"cache_dir": str(tmp_path / "cache")}}
    assert load(dataset_name=str(folder), **kwargs).examples == [{"prompt": "1+1=", "answer": "2"}]
    assert len(load("eval", dataset_name=str(folder), **kwargs)) == 2
    assert len(load("eval", dataset_name=str(folder), eval_dataset_size=1, **kwargs)) == 1
    with pytest.raises(UserError, match="dataset_test_split to null"):
        load("eval", dataset_name=str(folder), dataset_test_split="validation", **kwargs)


def test_a_procedural_task_is_the_same_every_time_and_its_questions_ignore_the_seed(load):
    task = {"dataset_name": "task:three-sums", "dataset_size": 20, "eval_dataset_size": 5}
    assert load(**task).examples == load(**task).examples
    assert load(**task).examples != load(seed=4, **task).examples
    assert load("eval", **task).examples == load("eval", seed=4, **task).examples
    with pytest.raises(UserError, match="three-sums"):
        load(dataset_name="task:three-sum")


def test_evaluation_data(settings):
    def has(**changes):
        return has_eval_data(Config.load(None, settings(**changes)))

    assert not has()  # a file has no test split
    assert has(eval_dataset_name="questions.jsonl")
    assert has(dataset_name="task:three-sums")
    assert not has(dataset_name="task:three-sums", dataset_test_split=None)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "1", "gold": "2"}], "no column 'answer'; its columns are prompt, gold"),
        ([{"answer": "1"}], "no column 'prompt'; its columns are answer"),
        ([{"prompt": "1", "answer": "2"}, {"prompt": "1"}], "row 1 has no column 'answer'"),
        ([{"prompt": 7, "answer": "2"}], "a prompt must be text or a list"),
        ([{"prompt": [{"text": "x"}], "answer": "2"}], "a prompt must be text or a list"),
        ([], "it has no rows"),
        ([{"prompt": "", "answer": "2"}], "1 empty"),
    ],
)
def test_unusable_rows(tmp_path, load, rows, said):
    with pytest.raises(UserError) as error:
        load(dataset_name=write(tmp_path / "d.jsonl", rows))
    assert said in str(error.value)


def test_unreadable_files(tmp_path, load):
    with pytest.raises(UserError, match="there is no data file"):
        load(dataset_name=str(tmp_path / "none.jsonl"))
    broken = tmp_path / "d.jsonl"
    broken.write_text('{"prompt": "1", "answer": "2"}\n\n{"prompt"\n')
    with pytest.raises(UserError, match="line 3: not JSON"):
        load(dataset_name=str(broken))
    broken.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1: expected a JSON object"):
        load(dataset_name=str(broken))
    parquet = tmp_path / "d.parquet"
    parquet.write_text("no parquet")
    with pytest.raises(UserError, match="not a readable parquet file"):
        load(dataset_name=str(parquet))


def test_conversations_and_text(tmp_path, load, tiny):
    tokenizer = tiny.make_tokenizer()
    talk = [{"role": "user", "content": "1+2"}]
    rows = [{"prompt": talk, "answer": "3"}, {"prompt": "4+5", "answer": "9"}]
    name = write(tmp_path / "d.jsonl", rows)

    def texts(**changes):
        return [tokenizer.decode(ids) for ids in load(dataset_name=name, **changes).ids]

    assert texts() == ["1+2=", "4+5"]  # the template ends with "="; text stays as it is
    assert texts(apply_chat_template=True) == ["1+2=", "4+5="]
    assert texts(system_prompt="0") == ["01+2=", "4+5"]
    plain = tiny.make_tokenizer()
    plain.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        load_prompts(Config.load(None, {**REQUIRED, "dataset_name": name}), plain, "train")


def test_prompts_that_do_not_fit_are_dropped_and_counted(tmp_path, load):
    prompts = ["1", "12", "", "123", "1234"]
    name = write(tmp_path / "d.jsonl", [{"prompt": p, "answer": "0"} for p in prompts])
    data = load(dataset_name=name, max_prompt_length=3)
    assert [e["prompt"] for e in data.examples] == ["1", "12", "123"]
    assert data.dropped == {"empty": 1, "over-long": 1}
    with pytest.raises(UserError, match=r"\(1 over-long\).*max_prompt_length \(1\)"):
        load(dataset_name=write(tmp_path / "e.jsonl", [{"prompt": "123", "answer": "0"}]), max_prompt_length=1)


def test_a_digest_of_what_is_trained_on(load, tmp_path):
    def digest(*rows, **changes):
        return load(dataset_name=write(tmp_path / "d.jsonl", rows), **changes).digest()

    one, two = {"prompt": "1+1=", "answer": "2", "level": 1}, {"prompt": "2+2=", "answer": "4", "level": None}
    assert digest(one, two) == digest(dict(reversed(one.items())), two)
    assert digest(one, two).startswith("9e87edde1ef9")  # whatever the machine
    others = [digest(two, one), digest(one), digest(one, {**two, "level": "None"}), digest(one, {**two, "answer": "5"})]
    others.append(digest(one, two, apply_chat_template=True))
    assert len({digest(one, two), *others}) == 6


def test_a_digest_does_not_depend_on_addresses_or_hashes():
    """Columns from parquet, `datasets` and reasoning_gym: dates, arrays, objects, sets, and what cannot be pickled."""

    @dataclasses.dataclass
    class Meta:
        numbers: set[int]
        note: str

    def digest(numbers, **changes):
        row = {"when": datetime.datetime(2026, 1, 2), "d": Decimal("1.50"), "array": numpy.arange(3.0), 1: b"x"}
        row |= {"meta": Meta(numbers, "\ud800"), "lock": threading.Lock(), "function": len, **changes}
        return Prompts([row], [[1, 2]]).digest()

    assert list({0, 8}) != list({8, 0})
    assert digest({0, 8}) == digest({8, 0})
    other = [digest({0, 9}), digest({0, 8}, array=numpy.arange(3)), digest({0, 8}, d=Decimal("1.5"))]
    assert len({digest({0, 8}), *other}) == 4


def test_order_is_a_fresh_permutation_each_epoch_and_can_be_entered_anywhere():
    size = 7
    stream = take(0, 4 * size, size, seed=1)
    epochs = [stream[i * size : (i + 1) * size] for i in range(4)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    for position in range(2 * size):
        for count in (1, 5, 9):
            assert take(position, count, size, seed=1) == stream[position : position + count]
    assert take(0, size, size, seed=2) != epochs[0]


def test_derived_seeds_are_stable_and_distinct():
    assert derive_seed(0, "order", 1) == 2002067703672271585  # on every machine and version: runs can be repeated
    seeds = {derive_seed(seed, name, step) for seed in range(5) for name in ("a", "b") for step in range(50)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)
