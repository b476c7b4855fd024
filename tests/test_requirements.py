"""The lock has what the packages and their tests ask for, in versions that they accept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib")  # Python 3.11


def test_the_lock_fits_what_is_asked_for(root: Path) -> None:
    lines = (root / "requirements" / "test.lock").read_text().splitlines()
    locked = {}
    for line in lines[1:]:
        name, version = re.fullmatch(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}", line).groups()
        locked[canonicalize_name(name)] = version
    assert re.match(r"# Python 3\.\d+, linux \w+\. ", lines[0]) and len(locked) == len(lines) - 1
    asked = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    asked += [line for line in (root / "requirements" / "test.txt").read_text().splitlines() if line[0] != "#"]
    for requirement in map(Requirement, asked):
        if requirement.name == "torch":  # the machine's choice
            continue
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None and requirement.specifier.contains(version), f"{requirement}, locked {version}"
