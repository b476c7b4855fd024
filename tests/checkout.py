"""A copy of the checkout, for scripts that build or change one: the checkout itself stays as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def copy_checkout(target: Path) -> Path:
    """Copies the sources to `target`, without what was built, installed or left by runs, and without what is hidden."""
    made = (".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "runs")
    return Path(shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*made)))
