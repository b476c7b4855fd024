"""examples/tour.py: the loss by hand is the library's, and its picture has all four cells."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

TOUR = Path(__file__).resolve().parents[2] / "examples" / "tour.py"


def test_the_tour_runs_and_shows_what_it_says(capsys):
    runpy.run_path(str(TOUR), run_name="__main__")  # it asserts that both are the same
    said = capsys.readouterr().out
    by_hand, ours = re.search(r"by hand ([\d.]+), by gated_kl_loss ([\d.]+)", said).groups()
    assert abs(float(by_hand) - float(ours)) < 2e-6
    tokens = [int(number) for number in re.findall(r"(\d) tokens", said)]
    assert len(tokens) == 4 and sum(tokens) == 8 and min(tokens) > 0
    assert all(f"  {gate} " in said for gate in ("opd", "sg-opd", "opdvr", "protect"))
