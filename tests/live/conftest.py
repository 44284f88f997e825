"""The agent that the live tests share: started once, by the first test that calls it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.live.served import Served, serve


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`minmo serve` with the shipped weights."""
    with serve(tmp_path_factory.mktemp("served")) as running:
        yield running
