"""Named benchmarks: their questions as the data sets have them, from local files of the same columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgopd.benchmarks import BENCHMARKS, INSTRUCTION, configs_of, named
from sgopd.cli import main
from sgopd.config import Config, UserError
from sgopd.rows import load_rows

# A row of each as its card has it, with what the verifier is to compare with.
ROWS = {
    "aime24": ({"id": 60, "problem": "Find m+n.", "solution": "…", "answer": "204", "year": "2024"}, "204"),
    "aime25": ({"problem": "Find the sum.", "answer": "70", "id": "0"}, "70"),
    "amc23": ({"id": 0, "question": "How many miles?", "answer": "27.0", "url": ""}, "27.0"),
    "math500": ({"problem": "Convert $(0,3)$.", "solution": "…", "answer": r"\left( 3, \frac{\pi}{2} \right)"}, None),
    "minerva": ({"question": "Estimate.", "answer": "6.7e-11"}, "6.7e-11"),
    "olympiadbench": ({"id": 1606, "question": "Determine $T$.", "final_answer": ["$2$"], "unit": None}, "$2$"),
}


@pytest.fixture
def run_config(settings, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    own = {"max_prompt_length": 3, "dataset_kwargs": {"revision": "x"}, "dataset_name": "somewhere/else", "eval_k": 1}
    path.write_text(json.dumps(settings(**own)))
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_questions_are_read_from_its_columns(name: str, kind: str, run_config: Path, tmp_path: Path) -> None:
    row, answer = ROWS[name]
    place = tmp_path / (f"{BENCHMARKS[name].split}.jsonl" if kind == "file" else "data")
    if kind == "folder":  # as `datasets` reads the hub's: by split
        place.mkdir()
    (place if kind == "file" else place / f"{BENCHMARKS[name].split}.jsonl").write_text(json.dumps(row) + "\n")
    [(got, config)] = configs_of(f"{name}={place}", run_config, {}).items()
    [read] = load_rows(config, "eval")
    assert got == name
    assert read.columns["prompt"] == row[BENCHMARKS[name].prompt_column]
    assert read.columns["answer"] == (answer or row["answer"])
    assert (config.verifier, config.apply_chat_template, config.eval_k) == ("math", True, None)
    assert config.max_prompt_length is None and config.dataset_kwargs == {} and config.system_prompt == INSTRUCTION


def test_small_sets_take_32_answers_and_flags_go_over_that(run_config: Path) -> None:
    configs = configs_of("aime24, math500", run_config, {"num_generations_eval": 2, "system_prompt": "Own."})
    assert [config.num_generations_eval for config in configs.values()] == [2, 2]
    assert {config.system_prompt for config in configs.values()} == {"Own."}
    samples = {
        name: config.num_generations_eval for name, config in configs_of("aime24,math500", run_config, {}).items()
    }
    assert samples == {"aime24": 32, "math500": 4}
    assert configs["math500"].eval_dataset_name == "HuggingFaceH4/MATH-500"
    assert configs_of("olympiadbench", run_config, {})["olympiadbench"].dataset_config == "OE_TO_maths_en_COMP"


def test_what_is_no_benchmark_is_refused(run_config: Path) -> None:
    with pytest.raises(UserError, match="benchmarks: got 'aime23', expected one or more of aime24, aime25"):
        named("aime24,aime23")
    with pytest.raises(UserError, match="got 'aime24' twice"):
        named("aime24,aime24=x.jsonl")
    with pytest.raises(UserError, match="benchmarks: got 'aime24=', expected NAME or NAME=FILE"):
        named("aime24=")
    with pytest.raises(UserError, match="prompt_column: got 'q', but a benchmark has its own"):
        configs_of("aime24=x.jsonl,amc23", run_config, {"prompt_column": "q"})
    local = configs_of("aime24=x.jsonl", run_config, {"prompt_column": "q"})["aime24"]
    assert (local.prompt_column, local.answer_column) == ("q", "answer"), "a file may have columns of its own"


def test_the_command_evaluates_each(settings, tmp_path: Path, capsys) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings(eval_teacher=True)))
    files = {name: tmp_path / f"{name}.jsonl" for name in ("aime24", "amc23")}
    for name, file in files.items():
        file.write_text((json.dumps(ROWS[name][0]) + "\n") * 3)
    names = ",".join(f"{name}={file}" for name, file in files.items())
    flags = ["--benchmarks", names, "--num_generations_eval", "2", "--verifier_workers", "1"]
    assert main(["evaluate", str(config), *flags]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["model"], one["benchmark"]) for one in records] == [
        ("student", "aime24"),
        ("student", "amc23"),
        ("teacher", "aime24"),
        ("teacher", "amc23"),
    ]
    assert all((one["eval/questions"], one["eval/samples"], one["eval/k"]) == (3, 2, 2) for one in records)
    assert main(["evaluate", str(config), "--benchmarks", "aime"]) == 1
    assert "benchmarks: got 'aime'" in capsys.readouterr().err
    assert Config.load(config).eval_dataset_name is None
