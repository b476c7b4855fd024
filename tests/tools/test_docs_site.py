"""The site's table of settings is the code's, and its links stay inside the site."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

from docs_site import SETTINGS, on_page_markdown

from sgopd.config import Config


def test_every_setting_is_in_the_table_once() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="config.md"))
    text = on_page_markdown(f"# Settings\n\n{SETTINGS}\n", page=page)
    for field in dataclasses.fields(Config):
        assert text.count(f"\n| `{field.name}` |") == 1, field.name
        assert field.metadata["help"].replace("<", "&lt;") in text
    assert "| `max_steps` | `1000` | optimiser updates | a whole number | free |" in text
    assert "\n## Loss (sgopd_kernels.gated_kl_loss)\n" in text


def test_links_out_of_the_site_become_names() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="notes/tried.md"))
    text = on_page_markdown("[a](../kernels.md) [b](../../CONTRIBUTING.md) [c](https://x.org/y) [d](#there)", page=page)
    assert text == "[a](../kernels.md) b (`CONTRIBUTING.md`) [c](https://x.org/y) [d](#there)"
