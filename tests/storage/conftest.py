from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.calls import CallStore
from storage.config import StorageConfig

NOW = dt.datetime(2026, 11, 22, 16, 0, tzinfo=dt.UTC)


@pytest.fixture
def now() -> dt.datetime:
    return NOW


@pytest.fixture
def config(tmp_path: Path) -> StorageConfig:
    return StorageConfig(folder=tmp_path / "var", is_synced=False, journal_reserve_mib=0, group_commit_ms=1)


@pytest.fixture
def store(config: StorageConfig) -> Iterator[CallStore]:
    made = CallStore(config)
    yield made
    made.close()
