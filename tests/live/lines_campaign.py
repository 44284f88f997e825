"""The whole stack with the fake engine and one campaign that may call out and hand over to a person; what it stored."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.app import Stack
from agent.config import Config, load_config
from agent.dial_socket import Dial, Dialled, NotDialled, ask
from agent.run_folder import DIAL_SOCKET
from storage.config import StorageConfig
from storage.search import CallReader
from storage.security import list_security_events
from tests.live.stack import _FAKE_CHECKPOINT, REPOSITORY

FAKE_ENGINE = str(Path(__file__).parent / "fake_engine.py")
WITHIN_S = 60.0
CAMPAIGN = """
dids = ["100"]
shop = "acme orders"
order_digits = 5
tools = ["look_up_order", "transfer", "hang_up", "request_callback"]
{handoff}
[persona]
name = "anna"
[style]
languages = ["en"]
dialect = "us"
emotion = "calm"
rate = "normal"
[lines]
outbound_greeting = ["hello, this is anna at acme orders. i am calling about your order."]
{outbound}
"""
MAY_CALL = """
[outbound]
prefixes = ["+39"]
is_uri_allowed = true
caller_id = "+390299999"
"""


@dataclass
class CallingStack:
    stack: Stack
    config: Config
    folder: Path

    @property
    def address(self) -> str:
        return self.stack.sip_address

    async def dial(self, **wanted: str) -> Dialled | NotDialled:
        return await ask(self.stack.run_folder / DIAL_SOCKET, Dial(**({"campaign": "acme"} | wanted)))

    def reader(self) -> contextlib.closing[CallReader]:
        return contextlib.closing(CallReader.open(StorageConfig(folder=self.folder / "var")))

    def calls(self) -> list[dict[str, Any]]:
        with self.reader() as reader:
            return [reader.get_call(row["call_id"]) for row in reader.list_calls()]

    def security(self) -> list[dict[str, Any]]:
        with self.reader() as reader:
            return list_security_events(reader.engine)

    def events_of(self, call_id: str) -> list[dict[str, Any]]:
        with self.reader() as reader:
            return reader.get_events(call_id)

    async def until(self, condition: Callable[[dict[str, Any]], object], call_id: str = "") -> dict[str, Any]:
        """The call ("" = the newest), once this is true of its record."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                found = [call for call in self.calls() if call_id in ("", call["call_id"])]
                if found and condition(found[0]):
                    return found[0]
                await asyncio.sleep(0.2)

    async def closed(self, call_id: str = "") -> dict[str, Any]:
        return await self.until(lambda call: call["state"] == "closed", call_id)


@contextlib.asynccontextmanager
async def calling_stack(
    folder: Path, settings: dict[str, dict[str, Any]], *, outbound: str = MAY_CALL, handoff: str = ""
) -> AsyncIterator[CallingStack]:
    """`outbound`, `handoff`: lines of the campaign's file; `settings` lie over those of a test."""
    checkpoint, campaigns = folder / "fake", folder / "campaigns"
    checkpoint.mkdir()
    campaigns.mkdir()
    (checkpoint / "checkpoint.toml").write_text(_FAKE_CHECKPOINT)
    (campaigns / "acme.toml").write_text(CAMPAIGN.format(outbound=outbound, handoff=handoff))
    sections: dict[str, dict[str, Any]] = {
        "storage": {"folder": folder / "var"}, "agent": {"checkpoint": str(checkpoint)}, "web": {"port": 0},
        "policies": {"campaigns_dir": str(campaigns)}, "telephony": {"sip_port": 0},
    }  # fmt: skip
    for section, values in settings.items():
        sections[section] = sections.get(section, {}) | values
    config = load_config(None, sections)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        async with Stack(config, has_web=False, engine_command=(FAKE_ENGINE,)) as stack:
            yield CallingStack(stack, stack.config, folder)


def has_heard(call: dict[str, Any], words: str) -> bool:
    """The caller heard these words of the agent."""
    return any(words in (turn["heard_text"] or "") for turn in call["turns"] if turn["role"] == "agent")
