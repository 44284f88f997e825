"""What the tools do: the shell's side, against the store. Synchronous; called on a worker thread.

`check` is phase one of a tool (nothing changes), `commit` phase two (the reply was heard). The lines are the
result format that the checkpoint was trained on: "status shipped day wednesday", "open nine close five thirty",
"result changed".
"""

from __future__ import annotations

import datetime as dt
from dataclasses import asdict, dataclass

from agent.events import CommitTool, RunTool, ToolFinished
from minmo_runtime.text import time_words
from storage.calls import CallStore
from storage.orders import delivery_refusal

_UNDATED = frozenset({"cancelled", "unpaid"})  # nothing will arrive, so there is no day to tell
_REFUSALS = {"unknown_order": "result not_found", "unknown_day": "error", "too_late": "result too_late"}


@dataclass(frozen=True)
class Shop:
    """The tools of one call's campaign. `can_transfer`: somebody can be reached at all."""

    store: CallStore
    call_id: str
    campaign: str
    can_transfer: bool

    def check(self, asked: RunTool) -> ToolFinished:
        content, is_ok, result = self._check(asked.name, asked.arguments)
        return ToolFinished(asked.tool_call_id, content, is_ok, {"content": content, **result})

    def _check(self, name: str, arguments: dict[str, str]) -> tuple[str, bool, dict[str, object]]:
        match name:
            case "look_up_order":
                order = self.store.look_up_order(arguments["order_number"])
                if order is None:
                    return "status not_found", True, {}
                day = "" if order.status in _UNDATED else f" day {order.day}"
                return f"status {order.status}{day}", True, asdict(order)
            case "opening_hours":
                hours = self.store.look_up_hours(arguments["day"], self.campaign)
                if hours is None:
                    return "error", False, {}
                if not hours.is_open:
                    return "closed", True, asdict(hours)
                return f"open {_in_words(hours.opens)} close {_in_words(hours.closes)}", True, asdict(hours)
            case "change_delivery":
                refusal = delivery_refusal(self.store.look_up_order(arguments["order_number"]), arguments["day"])
                return _REFUSALS.get(refusal, "result changed"), not refusal, {}
            case "transfer":
                return ("status connecting" if self.can_transfer else "status busy"), True, {}
            case "request_callback":
                return "result stored", True, {}
            case "send_keys":
                return "result sent", True, {}
            case "pause_recording":
                return "result paused", True, {}
            case "go_on_recording":
                return "result recording", True, {}
        return "", True, {}  # hang_up: nothing to say about it

    def commit(self, heard: CommitTool, now: dt.datetime) -> tuple[str, dict[str, object]]:
        """Carry out the side effect; the state (done | failed) and result to keep."""
        assert heard.name == "change_delivery", heard.name  # the others are the call's own acts
        order_number, day = heard.arguments["order_number"], heard.arguments["day"]
        outcome = self.store.change_delivery(self.call_id, order_number, day, now=now)
        return ("done" if outcome == "ok" else "failed"), {"outcome": outcome}


def _in_words(time: str) -> str:
    hour, minute = (int(part) for part in time.split(":"))
    return time_words(hour, minute)
