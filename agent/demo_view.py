"""The conversation on the terminal while it happens: the tail of the journal, as lines. Reads the database only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from minmo_runtime.text import display_case
from storage.search import CallReader

POLL_S = 0.15
_SHOWN_METRICS = {
    "first_word_ms": "first word",
    "voice_to_voice_ms": "voice to voice",
    "duck_ms": "ducked",
    "stop_ms": "stopped",
    "pause_ms": "paused",
    "filler_ms": "filler",
}


class LiveView:
    """Follows the first call that appears after it was made."""

    def __init__(self, reader: CallReader, say: Callable[[str], None]) -> None:
        self._reader, self._say = reader, say
        self._after_id = reader.last_journal_id()
        self.call_id = ""
        self._rate_hz = 8000
        self._roles: dict[str, str] = {}

    async def follow(self) -> None:
        while True:
            self.print_new()
            await asyncio.sleep(POLL_S)

    def print_new(self) -> None:
        for row in self._reader.tail_journal(after_id=self._after_id):
            self._after_id = row["id"]
            if not self.call_id:
                self.call_id = row["call_id"]
            if row["call_id"] == self.call_id and (line := self._line(row["kind"], row["payload"])):
                self._say(line)

    def _line(self, kind: str, payload: dict[str, Any]) -> str:
        match kind:
            case "call_opened":
                return f"call {self.call_id} from {payload['ani']} to {payload['did']}"
            case "turn_appended":
                self._roles[payload["turn_id"]] = payload["role"]
                if payload["role"] == "caller":
                    return self._spoken("caller", payload["fields"].get("heard_text", ""))
            case "turn_updated":
                return self._turn_line(payload)
            case "metric_added" if payload["name"] in _SHOWN_METRICS:
                return f"{'':>10}  [{_SHOWN_METRICS[payload['name']]} {payload['value']:.0f} ms]"
            case "tool_call_recorded" if payload["state"] != "requested":
                arguments = " ".join(f"{key} {value}" for key, value in payload["arguments"].items())
                result = (payload["result"] or {}).get("content", "")
                return f"{'tool':>10}  {payload['name']} {arguments} -> {result} ({payload['state']})"
            case "defect_added":
                return f"{'defect':>10}  {payload['kind_of_defect']}: {payload['detail']}"
            case "call_closed":
                return f"call ended by {payload['ended_by']}: {payload['disposition']} ({payload['cause']})"
        return ""

    def _turn_line(self, payload: dict[str, Any]) -> str:
        fields, role = payload["fields"], self._roles.get(payload["turn_id"], "agent")
        if role != "agent" or "heard_text" not in fields:
            return ""
        unheard = " [cut]" if fields.get("was_interrupted") else ""
        return self._spoken(role, (fields["heard_text"] or "") + unheard)

    def _spoken(self, role: str, text: str) -> str:
        return f"{role:>10}  {display_case(text)}"
