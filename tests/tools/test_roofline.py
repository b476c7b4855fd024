"""The cost model's identities: what can be counted by hand must come out of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import roofline as model
from page import on_page


def products(cost: Any, shape: Any) -> float:
    """FLOP for each of the N V logits."""
    return cost.flop / shape.logits


def test_operations() -> None:
    s = model.Shape()
    hs, ht = s.student, s.teacher
    for cost, expected in (
        (model.exact(s), 6 * hs + 2 * ht),
        (model.exact(s, model.IN_PARTS), 10 * hs + 6 * ht),
        (model.exact(s, density=0.5), 4 * hs + 2 * ht),
        (model.statistics(s), 2 * (hs + ht)),
        (model.recomputed(s), 8 * hs + 4 * ht),
    ):
        assert products(cost, s) == pytest.approx(expected)


def test_the_arithmetic_floors_that_were_worked_out_by_hand() -> None:
    """Milliseconds at 800 TFLOP/s, target shape."""
    s, device = model.Shape(), model.Device("round", 800e12, 3e12, "")
    assert 1e3 * model.statistics(s).arithmetic(device) == pytest.approx(19.1, abs=0.05)
    assert 1e3 * model.exact(s).arithmetic(device) == pytest.approx(31.9, abs=0.05)
    assert 1e3 * model.exact(s, density=0.5).arithmetic(device) == pytest.approx(25.5, abs=0.05)
    assert 1e3 * model.recomputed(s).arithmetic(device) == pytest.approx(51.0, abs=0.05)


def test_bytes_of_one_chunk_by_hand() -> None:
    """N = R = 2, V = 3, Hs = 5, Ht = 7: every operand once."""
    s = model.Shape(tokens=2, vocabulary=3, student=5, teacher=7, chunk=2)
    by_name = {stage.name: stage.traffic for stage in model.exact(s).stages}
    assert by_name["student logits"] == 3 * 5 * 2 + 2 * 5 * 2 + 2 * 3 * 4
    assert by_name["teacher logits"] == 3 * 7 * 2 + 2 * 7 * 2 + 2 * 3 * 4
    assert by_name["rows"] == 2 * 3 * (4 + 4) + 2 * 3 * (4 + 4 + 2)
    assert by_name["operands to fp16"] == 3 * 5 * (2 + 2 + 2) + 2 * 5 * (2 + 2 + 4 + 4 + 2)
    assert by_name["dH"] == 2 * 3 * 2 + 3 * 5 * 2 + 2 * 5 * 2
    assert by_name["dW"] == 2 * 3 * 2 + 2 * 5 * 2 + 3 * 5 * 4 + 3 * 5 * (4 + 2)
    # fp32 operands: each is read and written as three fp16 numbers, which the product reads.
    parts = {stage.name: stage.traffic for stage in model.exact(s, model.IN_PARTS).stages}
    assert parts["teacher parts"] == (3 * 7 + 2 * 7) * (4 + 6)
    assert parts["teacher logits"] == (3 * 7 + 2 * 7) * 6 + 2 * 3 * 4
    assert parts["rows"] == by_name["rows"] and parts["dH"] == by_name["dH"]
    assert parts["dW"] == by_name["dW"] + 3 * 5 * 2
    rows = next(stage for stage in model.statistics(s).stages if stage.name == "rows")
    assert rows.traffic == 2 * 3 * (4 + 4)


def test_smaller_chunks_read_the_heads_more_often_and_change_nothing_else() -> None:
    s = model.Shape(tokens=4096, chunk=4096)  # one chunk against two
    halves = replace(s, chunk=2048)
    heads = s.vocabulary * (2 * s.student + s.teacher) * 2  # student's for logits and dH, teacher's for logits
    accumulator = 2 * s.vocabulary * s.student * 4
    assert model.exact(halves).traffic - model.exact(s).traffic == pytest.approx(heads + accumulator)
    assert model.exact(halves).flop == model.exact(s).flop
    assert model.exact(halves).launches == 2 * model.exact(s).launches


def test_density_one_and_no_tokens() -> None:
    s = model.Shape()
    assert model.exact(s, density=1.0) == model.exact(s)
    assert model.exact(s, density=0.5).seconds(model.DEVICES[0]) < model.exact(s).seconds(model.DEVICES[0])
    empty = model.exact(replace(s, tokens=0))
    assert empty.flop == 0 and empty.launches == 0


def test_every_device_says_where_its_rates_come_from() -> None:
    for d in model.DEVICES:
        assert d.source and 0 < d.bandwidth < d.bf16
    assert {d.name for d in model.DEVICES} == {"H100", "H200", "A100", "B200"}


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "roofline.md"
    monkeypatch.setattr("sys.argv", ["roofline", "--tokens", "128", "--chunks", "64", "128", "--output", str(out)])
    model.main()
    text = out.read_text(encoding="utf-8")
    assert "N 128" in text and "Not measured" in text
    for plan in model.PLANS:
        assert f"| {plan} |" in text


def test_the_page_has_what_the_script_prints(root: Path) -> None:
    """`python tools/roofline.py --page docs/gpu.md` brings it up to date."""
    page = (root / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert on_page(page, "roofline", model.markdown(model.Shape(), model.CHUNKS)) == page
