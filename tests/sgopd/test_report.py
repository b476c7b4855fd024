"""The report: complete on a full run, with gaps on a partial one, and inert whatever the model wrote."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from sgopd.config import UserError
from sgopd.report import write_report
from sgopd.report.checks import Health, checks
from sgopd.report.figures import SECTIONS
from sgopd.report.run import read_metrics, read_run
from sgopd_kernels import PLANS

Record = dict[str, Any]


def healthy_run(updates: int = 200) -> list[Record]:
    """Records of a made-up run in which everything goes well."""
    rng = random.Random(0)
    accuracy = lambda step: 0.2 + 0.38 * (1 - math.exp(-3 * step / 200))  # noqa: E731
    findings = ["vocabulary: 17 tokens, 17 rows in both heads", "end of sequence: <eos>, the same in both"]
    start = {"kind": "config", "step": 0, "device": "cpu", "parameters": 83_000, "findings": findings}
    records: list[Record] = [start, evaluation("teacher", 0, 0.65, 0.88), evaluation("student", 0, accuracy(0), 0.95)]
    for step in range(1, updates + 1):
        progress = step / 200
        kl = 0.4 * math.exp(-4 * progress) + 0.02
        share = max(0.0, 0.3 * (1 - step / 50))
        correct = min(1.0, max(0.0, rng.gauss(accuracy(step), 0.06)))
        proposed = round(64 * share)
        record: Record = {
            "kind": "train",
            "step": step,
            "loss": 1.4 * kl * rng.uniform(0.8, 1.2),
            "kl": kl * rng.uniform(0.8, 1.2),
            "logratio/mean": -kl * rng.uniform(0.7, 1.3),
            "logratio/abs_mean": 1.7 * kl * rng.uniform(0.8, 1.2),
            "gate/mean": rng.gauss(1.42, 0.02),
            "gate/agree_fraction": rng.gauss(0.52, 0.02),
            "gate/agree_fraction_weighted": rng.gauss(0.63, 0.03),
            "entropy/student": 0.55 - 0.2 * progress + rng.gauss(0, 0.01),
            "entropy/teacher": 0.33 + rng.gauss(0, 0.01),
            "rollout/accuracy": correct,
            "rollout/correct": round(64 * correct),
            "rollout/incorrect": 64 - round(64 * correct),
            "rollout/unknown": 0,
            "rollout/length_mean": 24 + rng.gauss(0, 0.4),
            "rollout/length_clipped": max(0.0, rng.gauss(0.01, 0.01)),
            "rollout/repetition": abs(rng.gauss(0.02, 0.005)),
            "phase/teacher_share": share,
            "engine/logprob_gap_mean": 3e-7 * rng.uniform(0.5, 2),
            "engine/logprob_gap_max": 4e-6 * rng.uniform(0.5, 2),
            "optim/lr": 1e-3 * (1 - progress),
            "optim/grad_norm": 2 * kl + rng.uniform(0, 0.1),
            "optim/clipped_share": 1.0 * (2 * kl > 0.7),
            "optim/skipped": 0,
            "time/rollout": rng.uniform(0.15, 0.2),
            "time/verify": rng.uniform(0.01, 0.03),
            "time/update": rng.uniform(0.08, 0.1),
            "tokens": 1536,
            "tokens_per_second": rng.uniform(4800, 5600),
            "plan/exact": 0.0,
            "plan/filtered": 1.0,
            "plan/quantized": 0.0,
            "plan/blocks": 0.0,
            "plan/kept": rng.uniform(0.01, 0.02),
            "plan/error_estimate": 1e-5 * rng.uniform(0.5, 20),
            "verifier/timeout": 0.0,
            "verifier/error": 0.0,
            "verifier/no_answer": max(0.0, 0.06 * (1 - progress)),
            "verifier/truncated": 0.01,
            "verifier/crashed": 0.0,
        }
        if proposed:
            endorsed = round(proposed * rng.uniform(0.55, 0.75))
            record |= {
                "phase/teacher_proposed": proposed,
                "phase/teacher_endorsed": endorsed,
                "phase/acceptance": endorsed / proposed,
                "loss/teacher_rollouts": 1.8 * kl * rng.uniform(0.7, 1.3),
            }
        for word, part in (("correct", correct), ("incorrect", 1 - correct)):
            for cell, agreement, weight in (("agree", 0.52, 1.8), ("conflict", 0.41, 1.0)):
                sign = 1 if (word == "correct") == (cell == "agree") else -1
                size = kl * rng.uniform(0.5, 1.0) * (3 if sign < 0 else 1)
                record |= {
                    f"cell/{word}_{cell}/share": part * agreement,
                    f"cell/{word}_{cell}/logratio_mean": sign * size,
                    f"cell/{word}_{cell}/logratio_abs_mean": size,
                    f"cell/{word}_{cell}/gate_mean": weight,
                }
        records.append(record)
        if step % 50 == 0:
            records.append(evaluation("student", step, accuracy(step), 0.955))
    return [*records, {"kind": "end", "step": updates}]


def evaluation(model: str, step: int, average: float, passing: float) -> Record:
    return {
        "kind": "eval",
        "step": step,
        "model": model,
        "eval/k": 16,
        "eval/samples": 16,
        "eval/questions": 256,
        "eval/avg_at_k": average,
        "eval/avg_at_k_se": 0.012,
        "eval/pass_at_k": passing,
        "eval/pass_at_k_se": 0.009,
        "eval/length_mean": 24.3,
    }


def completion(step: int, text: str, verdict: int = 1, **more: Any) -> Record:
    reason = {1: "correct", -1: "incorrect", 0: "timeout"}[verdict]
    row = {"step": step, "source": "student", "prompt": [{"role": "user", "content": "27+48+91"}], "answer": "166"}
    return {**row, "completion": text, "verdict": verdict, "reason": reason, **more}


CONFIG = """\
model_name_or_path: checkpoints/student
teacher_model_name_or_path: checkpoints/teacher
dataset_name: task:three-sums
gate: sg-opd
estimator: full
divergence: reverse-kl
learning_rate: 0.001
"""


def write_run(
    folder: Path, records: list[Record], completions: list[Record] | None = None, config: str = CONFIG
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(config)
    for step in sorted({row["step"] for row in completions or []}):
        rows = [row for row in completions or [] if row["step"] == step]
        (folder / "completions").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / "completions" / f"step_{step:06d}.parquet"
        )
    return folder


class Page(HTMLParser):
    """Tags and visible text of a page, and whether every tag is closed in order."""

    VOID = frozenset({"meta", "br", "link", "img", "path", "use", "rect", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def report(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def read(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a healthy run, with its report."""
    completions = [completion(10, "first words"), completion(200, "last words", -1)]
    folder = write_run(tmp_path_factory.mktemp("run") / "healthy", healthy_run(), completions)
    assert write_report(folder) == folder / "report.html"
    return folder


def test_a_full_run_has_its_numbers_curves_and_texts(healthy: Path) -> None:
    page = Page(read(healthy))
    assert "avg@16 rose from 20.0 % to 56.1 % in 200 updates; the teacher has 65.0 %." in page.text.replace(
        "\u00a0", " "
    )
    for words in ("Student, before 20.0 ± 1.2", "95.5 ± 0.9", "Teacher 65.0 ± 1.2", "256 held-out questions"):
        assert words in page.text
    assert "first words" in page.text and "last words" in page.text
    assert "learning_rate: 0.001" in page.text
    described = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert page.tags.count("svg") == page.tags.count("figcaption") == len(described) == 28
    assert any(text.startswith("KL per token. KL: from") and "at step 200" in text for text in described)
    assert "Not measured" not in page.text


def test_a_healthy_run_raises_no_warning(healthy: Path) -> None:
    page = Page(read(healthy))
    assert not any(name == "class" and "warning" in value for _, name, value in page.attributes)
    assert "The verifier endorsed" in page.text


def test_the_page_needs_no_network(healthy: Path) -> None:
    html = read(healthy)
    page = Page(html)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    references = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert references and all(value.startswith("#") for value in references)
    assert "url(http" not in html and "@import" not in html
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {reference[1:] for reference in references} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)  # clip paths


def test_every_colour_of_a_figure_follows_the_theme(healthy: Path) -> None:
    html = read(healthy)
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn)
    assert set(re.findall(r"var\(--(\w+)\)", drawn)) <= set(re.findall(r"--(\w+):", html))


def test_rounding_of_coordinates_leaves_the_axis_labels_alone(tmp_path: Path) -> None:
    records = [{"kind": "train", "step": step, "gate/mean": 1.0 + step / 1000} for step in range(1, 6)]
    write_report(write_run(tmp_path, records))
    assert "1.002" in tick_labels(read(tmp_path))


def tick_labels(html: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", html)


def test_the_labels_of_an_axis_fit_beside_it_in_one_notation(tmp_path: Path) -> None:
    rates = [2.5e-4 * (1 - step / 200) for step in range(200)]
    records = [{"kind": "train", "step": step, "optim/lr": rate} for step, rate in enumerate(rates, start=1)]
    write_report(write_run(tmp_path, records))
    small = [label for label in tick_labels(read(tmp_path)) if "e" in label or "." in label]
    assert small == ["1e−4", "2e−4"]


def test_an_axis_of_shares_ends_at_a_hundred(tmp_path: Path) -> None:
    """Also where all shares are the same."""
    records = [{"kind": "train", "step": step, "optim/clipped_share": 1.0} for step in range(1, 30)]
    write_report(write_run(tmp_path, records))
    labels = [float(label) for label in tick_labels(read(tmp_path)) if label.replace(".", "").isdigit()]
    assert 100 in labels and max(labels) == 100


def test_changes_are_paired_by_question(tmp_path: Path) -> None:
    """The student gains one answer of four on every question: there is no doubt of it, whatever the questions."""
    counts = [0, 1, 2, 3] * 16
    more = {"eval/k": 2, "eval/samples": 4, "eval/questions": 64, "eval/questions_sha256": "x"}
    before = {**evaluation("student", 0, 0.375, 0.6), **more, "eval/correct": counts}
    after = {**evaluation("student", 9, 0.625, 0.8), **more, "eval/correct": [count + 1 for count in counts]}
    page = report(write_run(tmp_path / "same", [before, after]))
    assert "Change of the student +25.0 ± 0.0" in page.text
    assert "avg@k changed by +25.0 points (two standard errors, paired: 0.0)." in page.text
    for name, other in (("questions", {"eval/questions_sha256": "y"}), ("older", {"eval/correct": None})):
        page = report(write_run(tmp_path / name, [before, {**after, **other}]))
        assert "Change of the student" not in page.text
        assert "(two standard errors: 3.4)" in page.text


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    write_run(tmp_path, healthy_run(1))
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


def test_what_the_model_wrote_stays_text(tmp_path: Path) -> None:
    evil = "</pre></article><script>alert(1)</script><img src=x onerror=alert(2)> & \\boxed{1}"
    rows = [completion(1, evil, answer=evil, reason=evil, source=evil, prompt=evil)]
    page = report(write_run(tmp_path / evil.replace("/", "⁄"), healthy_run(1), rows, config=f"run_name: '{evil}'\n"))
    assert page.tags.count("script") == 2 and "img" not in page.tags  # the inspector's data and its code
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert page.text.count("<script>alert(1)</script>") >= 5


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, healthy_run(1), [completion(1, "x" * 5000)]))
    assert "x" * 4000 in page.text and "x" * 4001 not in page.text
    assert "[… 1,000 more characters]" in page.text


def test_rare_verdicts_are_among_the_completions(tmp_path: Path) -> None:
    rows = [completion(1, f"common {i}") for i in range(60)]
    rows += [completion(1, "wrong", -1), completion(1, "unknown", 0), completion(1, "taught", 1, source="teacher")]
    page = report(write_run(tmp_path, healthy_run(1), rows))
    assert all(words in page.text for words in ("wrong", "unknown", "taught"))
    assert page.attributes.count(("article", "class", "completion")) == 6


def test_a_file_cut_short_loses_its_last_line_only(healthy: Path, tmp_path: Path) -> None:
    text = (healthy / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(text[: int(len(text) * 0.6)])
    page = report(tmp_path)
    assert "1 line of metrics.jsonl could not be read" in page.text
    assert "incomplete" in page.text
    assert page.tags.count("svg") == 28


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    record = {"step": 0, "kind": "config", "system_prompt": "Be brief.\u2028Box\u2029the\x85answer."}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_metrics(tmp_path / "metrics.jsonl") == ([record], 0)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["not json", '{"no": "step"}', "[1, 2]", '"text"', "\x00\xff"],
        [json.dumps({"kind": "train", "step": 1})],
        [
            json.dumps(
                {
                    "kind": "train",
                    "step": 1,
                    "kl": None,
                    "loss": "nan",
                    "gate/mean": math.nan,
                    "entropy/student": math.inf,
                }
            )
        ],
        [json.dumps({"kind": "eval", "step": 0, "model": "student"})],
        [json.dumps({"kind": "eval", "step": 3, "eval/avg_at_k": 0.5})],
        [json.dumps({"kind": "end", "step": 0})],
        [json.dumps(record) for record in healthy_run(1)],
        [json.dumps(record) for record in healthy_run(3) if record["kind"] == "eval"],
        [
            json.dumps({"kind": "train", "step": s, "kl": 0.0, "optim/grad_norm": 0.0, "rollout/correct": 0})
            for s in (1, 2)
        ],
    ],
    ids=[
        "empty",
        "garbage",
        "no-keys",
        "no-numbers",
        "bare-eval",
        "late-eval",
        "end-only",
        "one-step",
        "eval-only",
        "zeros",
    ],
)
def test_a_partial_run_gives_a_page_with_gaps(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="latin-1")
    (tmp_path / ".lock").write_bytes(b"process 7 on here")
    page = report(tmp_path)
    assert "Checks" in page.text and "nan" not in page.text


def test_unreadable_neighbours_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, healthy_run(1), config="- a\n- list\n")
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions" / "step_000001.parquet").write_bytes(b"PAR1 not really")
    page = report(tmp_path)
    assert "config.yaml is not a YAML mapping" in page.text
    assert "completions/step_000001.parquet is not a readable parquet file" in page.text


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.jsonl; expected the output_dir"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "loss": 0.5}\n')  # another program's
    with pytest.raises(FileNotFoundError, match=r"its metrics\.jsonl is no run's"):
        write_report(tmp_path)


def test_a_page_of_someone_else_is_not_overwritten(tmp_path: Path) -> None:
    write_run(tmp_path, healthy_run(1))
    (tmp_path / "report.html").write_text("<title>Quarterly report</title>")
    with pytest.raises(UserError, match=r"report\.html is no report of a run, and would be overwritten: move it away"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "<title>Quarterly report</title>"


def test_a_figure_without_numbers_is_named(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, [{"kind": "train", "step": 1, "kl": 0.5}]))
    assert page.tags.count("svg") == 1
    assert "Not measured in this run: Loss, Log-ratio, Gate weight" in page.text


def test_a_step_written_twice_counts_once(tmp_path: Path) -> None:
    records = [{"kind": "train", "step": step, "kl": kl} for step, kl in ((1, 0.5), (2, 0.4), (2, 0.3))]
    page = report(write_run(tmp_path, records))
    assert any(
        "KL: from 0.5\u00a0nats at step 1 to 0.3\u00a0nats at step 2" in value for _, _, value in page.attributes
    )


def test_thousands_of_updates_stay_a_small_page(tmp_path: Path) -> None:
    rng = random.Random(0)
    keys = healthy_run(1)[3].keys() - {"kind", "step"}
    records = [{"kind": "train", "step": s, **{key: rng.random() for key in keys}} for s in range(1, 3001)]
    path = write_report(write_run(tmp_path, records))
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize(
    "change, name, advice",
    [
        (lambda r, t: {"rollout/length_mean": 20 + 20 * t}, "Length", "eos_token_id"),
        (lambda r, t: {"rollout/length_clipped": 0.5}, "Length", "max_completion_length"),
        (lambda r, t: {"entropy/student": 0.5 - 0.4 * t}, "Entropy", "gate_agree"),
        (lambda r, t: {"kl": 0.1 + t}, "KL to the teacher", "gate: opd"),
        (lambda r, t: {"phase/teacher_endorsed": 0}, "Teacher acceptance", "The cold start did nothing"),
        (lambda r, t: {"rollout/correct": 0, "rollout/incorrect": 64}, "Verdicts", "cold_start_steps"),
        (lambda r, t: {"rollout/unknown": 4, "verifier/timeout": 0.06}, "Unknown verdicts", "Most often: timeout"),
        (lambda r, t: {"engine/logprob_gap_mean": 0.06}, "Engine and trainer", "float32"),
        (lambda r, t: {"gate/mean": 0.0}, "Weights", "phase/reliability"),
        (lambda r, t: {"rollout/repetition": 0.5}, "Repetition", "Read the completions"),
        (lambda r, t: {"optim/skipped": 2 * (r["step"] >= 7)}, "Skipped updates", "2 of 200 updates"),
    ],
)
def test_each_failure_mode_is_found_and_no_other(tmp_path: Path, change: Any, name: str, advice: str) -> None:
    records = healthy_run()
    for record in records:
        if record["kind"] == "train":
            record |= change(record, record["step"] / 200)
    (warning,) = (check for check in checks(read_run(write_run(tmp_path, records))) if check.state == "warning")
    assert warning.name == name
    assert advice in warning.finding + warning.advice


@pytest.mark.parametrize(
    "name, numbers, settings, said",
    [
        ("KL to the teacher", {"kl": 1.0, "reward/taught": 0.1}, "", "Beside a task reward"),
        ("Weights", {"gate/mean": 0.0, "reward/taught": 0.1}, "", "teaches 10.0 % of the rollouts"),
        ("Weights", {"gate/mean": 0.01}, "prompt_weight: [1, 1]\n", "prompt_weight weighs."),
        ("Weights", {"gate/mean": 0.01}, "position_half_life: 10\n", "position_half_life weighs."),
    ],
)
def test_what_the_reward_and_other_weights_do_is_no_fault(
    tmp_path: Path, name: str, numbers: Record, settings: str, said: str
) -> None:
    records = healthy_run()
    for record in records:
        if record["kind"] == "train" and record["step"] > 100:
            record |= numbers
    (check,) = (
        one for one in checks(read_run(write_run(tmp_path, records, config=CONFIG + settings))) if one.name == name
    )
    assert check.state != "warning" and said in check.finding.replace("\u00a0", " ")
    health = Health()  # of the run while it trains
    health.see({"kind": "config", "step": 0, **(yaml.safe_load(settings) or {})})
    for record in records[1:]:
        health.see(record)
    assert not health.news()


def test_weights_of_0_are_warned_of_where_the_reward_says_nothing_either(tmp_path: Path) -> None:
    records = [record | {"gate/mean": 0.0, "reward/taught": 0.0} for record in healthy_run()]
    (warning,) = (check for check in checks(read_run(write_run(tmp_path, records))) if check.state == "warning")
    assert warning.name == "Weights"


def test_a_student_that_got_worse_is_warned_of(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, [evaluation("student", 0, 0.5, 0.9), evaluation("student", 9, 0.1, 0.5)]))
    assert "avg@16 fell from" in page.text
    assert ("div", "class", "check warning") in page.attributes
    assert "The student got worse." in page.text
    assert "avg@k changed by −40.0 points (two standard errors: 3.4)." in page.text


def test_lost_diversity_is_warned_of_though_the_accuracy_rose(tmp_path: Path) -> None:
    records = [evaluation("student", 0, 0.2, 0.95), evaluation("student", 9, 0.6, 0.85), {"kind": "end", "step": 9}]
    (warning,) = (check for check in checks(read_run(write_run(tmp_path, records))) if check.state == "warning")
    assert warning.name == "Diversity"
    assert warning.finding == "pass@k changed by −10.0 points (two standard errors: 2.5)."


def test_what_the_run_found_at_its_start_is_repeated(tmp_path: Path) -> None:
    said = ["vocabulary: 17 tokens", "warning: sequences end with [2] for the student and [0] for the teacher."]
    page = report(write_run(tmp_path, [{"kind": "config", "step": 0, "findings": said}]))
    assert "Before the first rollout sequences end with [2]" in page.text
    assert "Student and teacher vocabulary: 17 tokens." in page.text


def test_the_figure_of_plans_has_every_plan() -> None:
    """By name, for a report needs no torch: a plan that is renamed or added must not leave the figure."""
    (figure,) = (f for section in SECTIONS for f in section.figures if f.title == "Plan of the loss")
    assert [series.key for series in figure.series] == [f"plan/{name}" for name in PLANS]
