"""The table of planted defects is about this tree: every row can be planted, and the tests that it names are there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent))
import planted_defects


@pytest.mark.parametrize("defect", planted_defects.DEFECTS, ids=lambda defect: defect.what)
def test_a_defect_can_be_planted(root: Path, defect: Any) -> None:
    source = (root / defect.file).read_text(encoding="utf-8")
    assert defect.before in source, f"{defect.before!r} is not in {defect.file} any more"
    assert defect.after != defect.before
    for name in defect.tests.split():
        file, _, test = name.partition("::")
        path = root / planted_defects.file_of(file)
        assert path.is_file() and f"def {test.partition('[')[0]}(" in path.read_text(encoding="utf-8") + "def (", name
