"""Every option on every backend, held to the bounds that tools/errors.py's table shows them to keep."""

from __future__ import annotations

import errors as table
import pytest

OPTIONS = table.options()


@pytest.mark.parametrize("backend", table.BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_option(name: str, backend: str) -> None:
    # Near-equal models: fp32 projections themselves limit (test_parity compares with that limit).
    bound = 5e-4 if "near" in name else 1e-5
    assert max(table.errors(OPTIONS[name], backend)) <= bound
