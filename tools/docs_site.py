"""What mkdocs does to a page beside rendering it (`make docs`; mkdocs.yml names this file as a hook).

The table of settings is made from the code, and links to files beside docs/, which are right in the repository, become
the files' names.
"""

from __future__ import annotations

import dataclasses
import inspect
import posixpath
import re
import sys
import typing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sgopd.config import Config, default_text, describe

SETTINGS = "<!-- settings -->"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """mkdocs calls this for every page."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[2]))
        return f"{match[1]} (`{target.removeprefix('../')}`)" if target.startswith("../") else match[0]

    return re.sub(r"\[([^\]]+)\]\(([^):]+)\)", link, markdown.replace(SETTINGS, settings()))


def sections() -> dict[str, list[str]]:
    """Heading -> names of its fields, as the source groups them (`# --- heading ---`)."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in inspect.getsource(Config).partition("def __post_init__")[0].splitlines():
        if mark := re.fullmatch(r"    # --- (.+) ---", line):
            heading = mark[1]
        elif field := re.match(r"    (\w+): ", line):
            found.setdefault(heading, []).append(field[1])
    return found


def settings() -> str:
    """Every setting of a run, as Markdown tables."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    hints = typing.get_type_hints(Config)
    lines: list[str] = []
    for heading, names in sections().items():
        lines += ["", f"## {heading[0].upper()}{heading[1:]}", ""]
        lines += ["| setting | default | what it is | type | resumed |", "|---|---|---|---|---|"]
        for name in names:
            field = fields[name]
            required = field.default is field.default_factory is dataclasses.MISSING
            default = "required" if required else f"`{default_text(field)}`"
            cells = (f"`{name}`", default, field.metadata["help"], describe(hints[name]), field.metadata["resume"])
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    return "\n".join(lines)
