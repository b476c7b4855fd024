"""Which package is under test: a checkout that shadows the installed one would hide packaging mistakes."""

from __future__ import annotations

import os
from pathlib import Path

import sgopd
import sgopd_kernels


def test_packages_under_test_are_the_installed_ones(root: Path) -> None:
    from_source = os.environ.get("SGOPD_TEST_SOURCE") == "1"
    for package in (sgopd, sgopd_kernels):
        inside = Path(str(package.__file__)).resolve().is_relative_to(root / package.__name__)
        assert inside == from_source, f"{package.__name__} came from {package.__file__}"
