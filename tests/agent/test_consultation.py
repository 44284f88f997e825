"""Warm hand-off of a caller whose line cannot be joined: a browser, which no SIP worker holds. users.md J11."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

from agent.consultation import HandOffDesk
from agent.handoff_summary import Summary
from agent.workers import Workers


class Desk(HandOffDesk):
    async def _summary(self, setup: Any) -> Summary:
        return Summary("Caller: web-ann", ())


def test_caller_from_a_browser_is_not_joined_with_anybody_and_the_call_is_told_why() -> None:
    """What follows from the refusal (a sentence, a callback request, the call goes on): tests/scenarios."""
    noted: list[tuple[str, str, str]] = []

    async def ask() -> Any:
        desk: Any = Desk(SimpleNamespace(ring_s=1.0), None, None, None, Workers(), contextlib.nullcontext)  # type: ignore[arg-type]
        setup = SimpleNamespace(call_id="c1", leg_id="w1")
        return await desk.call_person(setup, setup, "sip:desk@pbx", lambda *what: noted.append(what), lambda: None)

    result = asyncio.run(ask())
    assert (result.sip_status, result.leg_id) == (501, "w1") and "cannot be joined" in result.reason
    assert [state for state, _, _ in noted] == ["calling", "failed"]
