"""Rooms and doors: a module imports what stands before it, never what stands after it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

# From the ground up. A module not listed stands where its package does.
ROOMS = {
    "sgopd_kernels": (
        "_extension _checks gate options problem oracle values backends plans driver ops loss api",
        {
            "plans": "calibration base directions exact narrow pairs quantized blocks",
            "backends": "torch native tensor_cores triton_kernels cpu cuda triton __init__",
        },
    ),
}


def imports(path: Path, package: str) -> set[str]:
    """Modules of `package` that a file imports, as dotted names below the package; `TYPE_CHECKING` counts as well."""
    here = list(path.parts[len(path.parts) - path.parts[::-1].index(package) : -1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) + 1 - node.level] + (node.module.split(".") if node.module else [])
            found |= {".".join([*base, name.name]) for name in node.names} if not node.module else {".".join(base)}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            found.add(".".join(node.module.split(".")[1:]))
    return found


@pytest.mark.parametrize("package", ROOMS)
def test_nothing_imports_upwards(root: Path, package: str) -> None:
    order, within = ROOMS[package]
    floors = {name: number for number, name in enumerate(order.split())}
    inner = {room: {name: number for number, name in enumerate(names.split())} for room, names in within.items()}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root / package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        assert parts[0] in floors, f"{path}: where does it stand?"
        for imported in imports(path, package):
            room, _, module = imported.partition(".")
            if room == parts[0] and room in inner and module:
                levels = inner[room]
                assert levels[module.split(".")[0]] < levels[parts[1]], f"{path} imports {imported}"
            elif room in floors and room != parts[0]:
                assert floors[room] < floors[parts[0]], f"{path} imports {imported}, which stands above it"
