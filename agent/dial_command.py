"""`minmo dial`: ask the running agent to call somebody for a campaign, and wait for the end where that is wanted.

Finds the agent by the settings it runs with (the same storage folder, the same user); writes the wish to the audit, as
the page does; reads the outcome from the database like any other program.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from typing import Any

from agent.config import Config
from agent.dial_socket import Dial, NotDialled, ask
from agent.run_folder import DIAL_SOCKET, find_run_folder
from storage.audit import append_audit
from storage.search import CallReader

WAIT_POLL_S = 0.5
ANSWERED = frozenset({"completed", "transferred"})


class DialRefused(Exception):
    """No call was placed; the text says why."""


def dial(config: Config, wanted: Dial, *, is_waiting: bool) -> dict[str, Any]:
    """The call's id, and with `is_waiting` how it ended. DialRefused."""
    folder = find_run_folder(config)
    if folder is None:
        raise DialRefused(f"no agent runs with storage.folder = {str(config.storage.folder)!r}")
    reader = CallReader.open(config.storage)
    try:
        party = wanted.number or wanted.uri
        append_audit(
            reader.engine, wanted.actor, "place_call", now=dt.datetime.now(dt.UTC), campaign=wanted.campaign,
            party=party, request_id=wanted.request_id,
        )  # fmt: skip
        answer = asyncio.run(ask(folder / DIAL_SOCKET, wanted))
        if isinstance(answer, NotDialled):
            raise DialRefused(f"{answer.code}: {answer.reason}")
        shown: dict[str, Any] = {"call_id": answer.call_id, "is_new": answer.is_new}
        return shown | _ended(reader, answer.call_id) if is_waiting else shown
    finally:
        reader.close()


def _ended(reader: CallReader, call_id: str) -> dict[str, Any]:
    while True:
        call = reader.get_call(call_id)
        if call["state"] == "closed":
            return {key: call[key] for key in ("direction", "did", "disposition", "cause", "ended_by")}
        time.sleep(WAIT_POLL_S)
