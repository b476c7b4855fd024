"""What a command prints for a page is written into it by that command, between two marks with a name.

<!-- errors -->
…
<!-- /errors -->
"""

from __future__ import annotations

from pathlib import Path


def on_page(page: str, name: str, text: str) -> str:
    """The page with `text` between the marks of `name`."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"expected one {begin} and one {end} on the page")
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{rest.split(end)[1]}"


def write(path: Path, name: str, text: str) -> None:
    """`on_page`, of a file."""
    path.write_text(on_page(path.read_text(encoding="utf-8"), name, text), encoding="utf-8")
