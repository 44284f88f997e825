"""What the tests of the agent share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is measured of a device (minmo_runtime/capacity.py) is not kept in the home folder of whoever runs tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
