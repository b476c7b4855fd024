"""`sgopd report RUN RUN …`: what two configurations differ in, and whether one is better on the same questions."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType

import pytest

from sgopd.cli import main
from sgopd.report import compare
from sgopd.report.run import read_run
from sgopd.scores import scores


@pytest.fixture(scope="module")
def made_up(root) -> ModuleType:
    """The made-up runs of test_report.py: importlib mode has no sibling imports."""
    spec = importlib.util.spec_from_file_location("made_up_runs", root / "tests" / "sgopd" / "test_report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["made_up_runs"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(made_up, tmp_path):
    """A run's folder: `gain` right answers of 4 more on each of 8 questions than the seed's first ones."""

    def make(name: str, gate: str, seed: int, gain: int, questions: str = "x", ended: bool = True, **more):
        counts = [min(4, (seed + place) % 3 + gain) for place in range(8)]
        end = {
            **scores(counts, 4, 2),
            "eval/correct": counts,
            "eval/questions_sha256": questions,
            "eval/length_mean": 9,
        }
        records = [
            *({"kind": "train", "step": step, "kl": 1 / step + seed / 100} for step in range(1, 6)),
            {"kind": "eval", "model": "student", "step": 5, **end, **more},
            *[{"kind": "end", "step": 5}] * ended,
        ]
        return made_up.write_run(tmp_path / name, records, config=f"gate: {gate}\nseed: {seed}\noutput_dir: {name}\n")

    return make


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL))


def test_seeds_are_one_configuration_and_differences_are_paired(run, tmp_path, capsys):
    folders = [run(f"{gate}-{seed}", gate, seed, gain=gate == "opdvr") for gate in ("opd", "opdvr") for seed in (0, 1)]
    target = tmp_path / "out" / "page.html"
    target.parent.mkdir()
    assert main(["report", *map(str, folders), "--output", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    page = target.read_text()
    text = text_of(page)
    assert "2 configurations, 4 runs" in text
    assert "gate opd 2 (seeds 0, 1)" in text and "gate opdvr 2 (seeds 0, 1)" in text
    # Every question gains one of four: nothing is uncertain, over questions or over seeds.
    assert "+25.0 [+25.0, +25.0] paired, 8 questions; ± 0.0 over 2 seeds" in text
    assert "gate opd opdvr" in text and "output_dir" not in text  # what differs, and what does not count
    assert page.count("<figure>") == 3  # both evaluations, and KL
    assert "FillBetween" in page or "PolyCollection" in page, "the seeds have no band"
    assert "<script" not in page
    assert "gate opd: 0." in page  # a figure in words


def test_one_run_each_has_intervals_over_questions(run, tmp_path):
    groups = compare.grouped([read_run(run("a", "opd", 0, 0)), read_run(run("b", "opdvr", 0, 3))])
    [_, row] = compare.rows(groups)
    assert row.differences[0] == ("+68.8 [+60.7, +76.8]", "paired, 8 questions")  # 3 of 4 on six questions, 2 on two
    assert row.runs == "1 (seed 0)"


@pytest.mark.parametrize("change", [{"questions": "y"}, {"eval/correct": None}])
def test_other_questions_are_not_paired(run, change):
    groups = compare.grouped([read_run(run("a", "opd", 0, 0)), read_run(run("b", "opdvr", 0, 1, **change))])
    [_, row] = compare.rows(groups)
    assert row.differences[0][1].startswith("not paired") and "[" not in row.differences[0][0]


def test_a_run_that_did_not_end_is_marked_and_other_updates_are_said(run, tmp_path):
    target = tmp_path / "page.html"
    whole, cut = run("a", "opd", 0, 0), run("b", "opdvr", 0, 1, ended=False, step=3)
    assert main(["report", str(whole), str(run("c", "opdvr", 1, 1)), "--output", str(target)]) == 0
    assert "incomplete" not in text_of(target.read_text()) and "same update" not in target.read_text()
    assert main(["report", str(whole), str(cut), "--output", str(target)]) == 0
    text = text_of(target.read_text())
    assert f"{cut}: The record stops after update 5, without the end of the run." in text
    assert f"The last evaluations are not of the same update: {whole} update 5, {cut} update 3." in text
    assert text.count("incomplete") == 1 and "1 (seed 0) incomplete" in text


def test_a_seed_that_is_there_twice_is_refused(run, tmp_path, capsys):
    folders = [str(run(name, "opd", 0, gain)) for name, gain in (("a", 0), ("b", 1))]
    assert main(["report", *folders, "--output", str(tmp_path / "page.html")]) == 1
    said = f"two runs of one configuration with seed 0, {folders[0]} and {folders[1]}, expected each seed once"
    assert said in capsys.readouterr().err


def test_a_hostile_name_or_setting_is_text(made_up, tmp_path):
    evil = "<script>alert(1)</script>"
    records = made_up.healthy_run(3)
    folders = [
        made_up.write_run(tmp_path / f"{number}", records, config=f"gate: {number}\nsystem_prompt: '{number}{evil}'\n")
        for number in (1, 2)
    ]
    target = tmp_path / "page.html"
    assert main(["report", *map(str, folders), "--output", str(target)]) == 0
    assert "<script" not in target.read_text() and "&lt;script&gt;alert(1)" in target.read_text()


def test_what_cannot_be_compared_is_said(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = run("a", "opd", 0, 0)
    for words, said in (
        ([str(folder), str(tmp_path / "none")], "has no metrics.jsonl"),
        ([str(folder), "--output", "x.html"], "the report of one run goes into its folder. Leave it out"),
    ):
        assert main(["report", *words]) == 1
        assert said in capsys.readouterr().err
    (tmp_path / "comparison.html").write_text("<title>mine</title>")
    assert main(["report", str(folder), str(run("b", "opd", 1, 0))]) == 1
    assert "is no comparison of runs, and would be overwritten" in capsys.readouterr().err
    many = [run(f"r{number}", f"g{number}", 0, 0) for number in range(13)]
    assert main(["report", *map(str, many), "--output", "many.html"]) == 1
    assert "got runs of 13 configurations, expected at most 12" in capsys.readouterr().err
