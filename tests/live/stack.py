"""The whole stack (parent, worker, engine, agent) for live tests: with the shipped weights, or with the fake engine."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.app import Stack, StartError
from agent.config import load_config

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
async def whole_stack(kind: str, folder: Path) -> AsyncIterator[RunningStack]:
    """`kind`: "weights" (skipped while there are none) or "fake engine"."""
    overrides: dict[str, dict[str, object]] = {
        "telephony": {"sip_port": 0}, "storage": {"folder": folder / "var"}, "agent": {},
    }  # fmt: skip
    command: tuple[str, ...] = ("-m", "minmo_runtime.server")
    if kind == "fake engine":
        checkpoint = folder / "fake"
        checkpoint.mkdir()
        (checkpoint / "checkpoint.toml").write_text(_FAKE_CHECKPOINT)
        overrides["agent"] = {"checkpoint": str(checkpoint)}
        command = (_FAKE_ENGINE,)
    try:
        stack = Stack(load_config(None, overrides), has_web=False, engine_command=command)
    except StartError as error:
        pytest.skip(str(error))
    async with stack:
        yield RunningStack(stack.sip_address, folder / "var" / "minmo.sqlite3")
