"""The whole stack (parent, worker, engine, agent) inside a test's own loop, so that the test can kill its parts.

With the fake engine behind the engine's socket unless told otherwise. For calls with the shipped weights see served.py.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.app import Stack
from agent.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
_FAKE_ENGINE = str(Path(__file__).parent / "fake_engine.py")
_FAKE_CHECKPOINT = """
name = "fake"
[facts]
languages = ["en"]
dialects = ["us", "general"]
emotions = ["neutral", "calm", "brisk"]
rates = ["slow", "normal", "fast"]
voices = ["nano"]
"""


@dataclass
class RunningStack:
    address: str
    database: Path

    def call_rows(self) -> list[sqlite3.Row]:
        """The calls table as another process sees it."""
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            return connection.execute("select * from calls").fetchall()


@contextlib.asynccontextmanager
async def whole_stack(folder: Path) -> AsyncIterator[RunningStack]:
    """All processes, with the fake engine."""
    checkpoint = folder / "fake"
    checkpoint.mkdir()
    (checkpoint / "checkpoint.toml").write_text(_FAKE_CHECKPOINT)
    overrides: dict[str, dict[str, object]] = {
        "telephony": {"sip_port": 0}, "storage": {"folder": folder / "var"}, "agent": {"checkpoint": str(checkpoint)},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        async with Stack(load_config(None, overrides), has_web=False, engine_command=(_FAKE_ENGINE,)) as stack:
            yield RunningStack(stack.sip_address, folder / "var" / "minmo.sqlite3")
