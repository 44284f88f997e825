"""Facts and engines for the policy tests."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest

from policies.config import PoliciesConfig
from policies.engine import PolicyEngine
from policies.facts import CallFacts, CheckpointFacts

CAMPAIGN = """
dids = ["{did}"]
shop = "blue river"
order_digits = 5
tools = ["look_up_order", "hang_up"]
[persona]
name = "nora"
[style]
languages = ["en"]
dialect = "us"
emotion = "calm"
rate = "normal"
"""


@pytest.fixture
def checkpoint() -> CheckpointFacts:
    return CheckpointFacts(
        name="tiny",
        languages=("en", "cmn"),
        dialects=("us",),
        emotions=("calm", "brisk"),
        rates=("slow", "normal"),
        voices=("agent",),
    )


@pytest.fixture
def facts() -> CallFacts:
    return CallFacts(call_id="c1", did="100", started_at=dt.datetime(2026, 1, 1, tzinfo=dt.UTC))


@pytest.fixture
def campaign_text() -> Callable[..., str]:
    """`campaign_text("300", more)` -> the TOML of a valid campaign with `more` lines on top."""

    def text(did: str = "300", more: str = "") -> str:
        return more + CAMPAIGN.format(did=did)

    return text


@pytest.fixture
def load(tmp_path: Path, checkpoint: CheckpointFacts) -> Callable[..., PolicyEngine]:
    """`load({"river": text}, default_campaign="river")` -> an engine over these campaign files."""

    def make(files: dict[str, str], **settings: object) -> PolicyEngine:
        for name, text in files.items():
            (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
        config = PoliciesConfig(campaigns_dir=str(tmp_path), **settings)
        return PolicyEngine.load(config, checkpoint, line_keys=frozenset({"greeting", "goodbye"}))

    return make
