"""The token inspector: what a run keeps of each token, and what of it is in the page."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from sgopd.cli import main
from sgopd.completions import token_texts
from sgopd.report import write_report
from sgopd.report.inspector import QUANTITIES


@pytest.fixture
def train(settings, tmp_path):
    """`sgopd train` with changes: (records of the updates, rows of completions/)."""

    def run(**changes):
        path = tmp_path / "settings.yaml"
        path.write_text(
            yaml.safe_dump(settings(**{"logging_steps": 1, "max_steps": 2, "truncated_is_incorrect": False, **changes}))
        )
        assert main(["train", str(path)]) == 0
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
        paths = sorted((tmp_path / "run" / "completions").glob("*.parquet"))
        return records, pyarrow.concat_tables(map(pyarrow.parquet.read_table, paths)).to_pylist()

    return run


def page_data(page: str) -> dict:
    """What a browser finds in the page, as sgopd/report/inspector.py describes it."""
    [block] = re.findall(r'<script type="application/octet-stream" id="rollouts">(.*?)</script>', page, re.DOTALL)
    data = base64.b64decode(block, validate=True)
    size = int.from_bytes(data[:4], "little")
    header, arrays, at = json.loads(zlib.decompress(data[4 : 4 + size])), zlib.decompress(data[4 + size :]), 0
    count = sum(header["lengths"])
    for name, width in header["arrays"]:
        planes = numpy.frombuffer(arrays, "u1", count * width, at).reshape(width, count)
        header[name] = planes.T.copy().view(f"<u{width}").reshape(-1)
        at += count * width
    assert at == len(arrays)
    return header


def test_tokens_are_kept_with_what_the_loss_measured(train, tmp_path):
    """All student rollouts of a batch are kept here, so their means must be the update's."""
    changes = {"num_completions_to_log": 64, "cold_start_steps": 1, "teacher_share": 0.5, "gate_tolerance": 0.01}
    records, rows = train(verifier="tests_verifier:half", gate="protect", max_completion_length=9, **changes)
    for record in records:
        mine = [row for row in rows if row["step"] == record["step"] and row["source"] == "student"]
        for row in mine:
            assert len(row["token_text"]) == len(row["token_id"]) == row["tokens"] <= 9
            assert re.sub("<(pad|eos|unk)>", "", "".join(row["token_text"])) == row["completion"]
            assert row["gate_verdict"] == row["verdict"]
        flat = {name: numpy.concatenate([row[name] for row in mine]) for name in (*QUANTITIES, "agreement")}
        for name, column in (
            ("logratio/mean", "logratio"),
            ("kl", "kl"),
            ("gate/mean", "gate"),
            ("entropy/student", "student_entropy"),
            ("entropy/teacher", "teacher_entropy"),
        ):
            assert flat[column].astype(float).mean() == pytest.approx(record[name], rel=2e-3), name
        assert (flat["agreement"] == 1).mean() == pytest.approx(record["gate/agree_fraction"])
        verdict = numpy.concatenate([[row["verdict"]] * row["tokens"] for row in mine])
        for word, sign in (("correct", 1), ("incorrect", -1)):
            share = ((flat["agreement"] == -1) & (verdict == sign)).mean()
            assert share == pytest.approx(record[f"cell/{word}_conflict/share"])
    assert {row["verdict"] for row in rows} == {1, -1}
    assert any(row["source"] == "teacher" and row["logratio"] for row in rows)


def test_the_kept_tokens_are_bounded_and_may_be_none(train):
    _, rows = train(num_tokens_to_log=3, gate="shuffled", verifier="tests_verifier:half", seed=5)
    assert max(row["tokens"] for row in rows) > 3
    for name in ("token_id", "token_text", "agreement", *QUANTITIES):
        assert [len(row[name]) for row in rows] == [min(3, row["tokens"]) for row in rows], name
    assert any(row["gate_verdict"] != row["verdict"] for row in rows)  # dealt to others, and said so


def test_without_statistics_there_are_nulls(train):
    """num_tokens_to_log 0; teacher rollouts whose loss has none are the same to what writes them."""
    _, rows = train(num_tokens_to_log=0, max_steps=1)
    assert all(row[name] is None for row in rows for name in ("token_text", "agreement", *QUANTITIES))


@pytest.fixture(autouse=True)
def verifier_module(tmp_path, monkeypatch):
    (tmp_path / "tests_verifier.py").write_text("def half(response, example): return sum(map(ord, response)) % 2 == 0")
    monkeypatch.syspath_prepend(str(tmp_path))


class Bytes:
    """A tokenizer of bytes, whose decoder drops the space that a text begins with."""

    def decode(self, ids, **options):
        return bytes(ids).decode(errors="replace").removeprefix(" ")


def test_token_texts_add_up_to_the_text():
    text = " naïve 😀 x \x80".encode()[:-2] + b"\xff\xfe"
    for ids in (list(text), list("é".encode())[:1], []):
        texts = token_texts(ids, [97], Bytes(), {})
        assert len(texts) == len(ids)
        assert "".join(texts) == bytes(ids).decode(errors="replace")
    assert token_texts(list("ï".encode()), [97], Bytes(), {}) == ["", "ï"]


def test_the_page_has_the_rollouts_as_they_were_kept(keep_rollouts, tmp_path):
    keep_rollouts(tmp_path, 40, 30, steps=2)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    data = page_data(write_report(tmp_path).read_text())
    tables = [pyarrow.parquet.read_table(path) for path in sorted((tmp_path / "completions").iterdir())]
    rows = pyarrow.concat_tables(tables).to_pylist()
    assert data["lengths"] == [30] * 40
    for name in ("step", "verdict", "gate_verdict", "tokens"):
        assert data["columns"][name] == [row[name] for row in rows], name
    for name in ("prompt", "answer", "extracted", "reason", "source"):
        places = data["columns"][name]
        assert [data["strings"][place] if place >= 0 else None for place in places] == [row[name] for row in rows], name
    for index, row in enumerate(rows):
        part = slice(30 * index, 30 * (index + 1))
        assert [data["pieces"][place] for place in data["piece"][part]] == row["token_text"]
        assert (data["agreement"][part].astype(int) - 1).tolist() == row["agreement"]
        for name in QUANTITIES:
            values = data[name][part].view("<f2").astype(float)
            numpy.testing.assert_allclose(values, row[name], rtol=2**-6, atol=1e-4, err_msg=name)


def test_infinite_and_missing_numbers_stay_what_they_are(keep_rollouts, tmp_path):
    keep_rollouts(tmp_path, 1, 4)
    [path] = (tmp_path / "completions").iterdir()
    table = pyarrow.parquet.read_table(path)
    odd = numpy.array([numpy.inf, -numpy.inf, numpy.nan, 65504.0], "f2")
    column = pyarrow.ListArray.from_arrays([0, 4], pyarrow.array(odd))
    place = table.column_names.index("logratio")
    pyarrow.parquet.write_table(table.set_column(place, "logratio", column), path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    values = page_data(write_report(tmp_path).read_text())["logratio"].view("<f2")
    assert values[0] == numpy.inf and values[1] == -numpy.inf and numpy.isnan(values[2])


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>]]><!-- \u202egnirts\u2066 \x00 "


def test_a_hostile_completion_is_text_and_is_cut(keep_rollouts, tmp_path):
    row = {name: EVIL for name in ("prompt", "answer", "extracted", "reason", "source")}
    flood = EVIL * (1_000_000 // len(EVIL))
    tokens = {"token_text": [flood, EVIL], "agreement": [1, -1], **{key: [0.5, 1.0] for key in QUANTITIES}}
    rows = [
        {**row, "step": 1, "verdict": 1, "gate_verdict": 1, "tokens": 2, "completion": flood, **tokens},
        {**row, "step": 1, "verdict": 7, "tokens": 10**6, "completion": flood, "token_text": [flood] * 3, "kl": [0.5]},
    ]
    (tmp_path / "completions").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "completions" / "step-000001.parquet")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    page = write_report(tmp_path).read_text()
    assert len(page) < 200_000
    assert re.findall(r"<script[^>]*>", page) == ['<script type="application/octet-stream" id="rollouts">', "<script>"]
    assert "<img" not in page.lower()
    data = page_data(page)
    assert data["lengths"] == [2, 0]  # lists that do not fit together are no statistics
    assert max(map(len, data["pieces"] + data["strings"])) < 4100
    assert [data["pieces"][place][:100] for place in data["piece"]] == [flood[:100], EVIL]
    assert data["strings"][data["columns"]["completion"][1]].startswith(EVIL)


def test_the_policy_allows_this_script_and_no_other(keep_rollouts, tmp_path):
    keep_rollouts(tmp_path, 2, 3)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    page = write_report(tmp_path).read_text()
    [policy] = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in html.unescape(policy).split(";"))
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["trusted-types"] == "'none'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert not re.search(r"\son\w+=", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
    assert len(script) < 20_000  # characters: it is to stay something one can read


def test_a_thousand_long_rollouts_are_five_megabytes_at_most(keep_rollouts, tmp_path):
    keep_rollouts(tmp_path, 1000, 500, steps=4)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    path = write_report(tmp_path)
    assert sum(page_data(path.read_text())["lengths"]) == 500_000
    assert path.stat().st_size <= 5_000_000


def test_of_too_many_rollouts_every_second_is_shown(keep_rollouts, tmp_path, monkeypatch):
    monkeypatch.setattr("sgopd.report.inspector.MAX_ROLLOUTS", 10)
    keep_rollouts(tmp_path, 15, 2)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    page = write_report(tmp_path).read_text()
    assert len(page_data(page)["lengths"]) == 8
    assert "7 more are in completions/" in page
    monkeypatch.setattr("sgopd.report.inspector.MAX_TOKENS", 6)
    assert len(page_data(write_report(tmp_path).read_text())["lengths"]) == 3
