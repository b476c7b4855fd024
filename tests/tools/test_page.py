"""What a command prints stands between its marks on a page."""

from __future__ import annotations

import pytest
from page import on_page


def test_a_table_is_put_between_its_marks() -> None:
    page = "before\n<!-- a -->\n\nold\n\n<!-- /a -->\nafter <!-- b --><!-- /b -->\n"
    once = on_page(page, "a", "| 1 |\n")
    assert once == "before\n<!-- a -->\n\n| 1 |\n\n<!-- /a -->\nafter <!-- b --><!-- /b -->\n"
    assert on_page(once, "a", "| 1 |") == once
    for missing in ("c", "a"):
        with pytest.raises(ValueError, match=f"expected one <!-- {missing} -->"):
            on_page(page + "<!-- a -->", missing, "")
