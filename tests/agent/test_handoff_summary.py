"""What a person is told before a hand-off: from the record, nothing else."""

from __future__ import annotations

from typing import Any

from agent.handoff_summary import summarise

HELLO, PRESS = "hello, there is a caller for you.", "please press one and i connect you."


def turn(text: str, role: str = "caller", **more: Any) -> dict[str, Any]:
    return {"role": role, "heard_text": text, "intent": "", "confidence": 0.9} | more


def tool(name: str, state: str, result: dict[str, Any] | None, **arguments: str) -> dict[str, Any]:
    return {"name": name, "state": state, "result": result, "arguments": arguments}


SHIPPED = tool(
    "look_up_order", "done", {"content": "status shipped day wednesday", "status": "shipped", "day": "wednesday"},
    order_number="45612",
)  # fmt: skip


def call(*turns: dict[str, Any], tools: tuple[dict[str, Any], ...] = (), **more: Any) -> dict[str, Any]:
    head = {"ani": "+39021", "campaign": "acme", "display_name": ""}
    return head | {"turns": list(turns), "tool_calls": list(tools)} | more


def test_summary_tells_who_what_was_said_and_what_was_found() -> None:
    record = call(
        turn("where is my order 45612"), turn("let me see", "agent"), turn("a person please"), tools=(SHIPPED,)
    )
    summary = summarise(record, HELLO, PRESS)
    assert summary.written.splitlines() == [
        "Caller: +39021", "Campaign: acme", "Said: where is my order 45612", "Said: a person please",
        "Found: order 45612 is shipped wednesday",
    ]  # fmt: skip
    assert summary.spoken == (
        HELLO, "the caller said where is my order four five six one two.", "the caller said a person please.",
        "order four five six one two is shipped wednesday.", PRESS,
    )  # fmt: skip


def test_what_was_not_understood_not_done_or_no_words_is_not_told() -> None:
    record = call(
        turn("mumble", confidence=0.1), turn("mm-hm", intent="backchannel"), turn(""), turn("invented", "agent"),
        tools=(
            tool("look_up_order", "requested", None, order_number="1"),
            tool("change_delivery", "cancelled", None, order_number="1", day="friday"),
            tool("change_delivery", "failed", {"outcome": "too_late"}, order_number="1", day="friday"),
            tool("hang_up", "done", None),
        ),
    )  # fmt: skip
    summary = summarise(record, HELLO, PRESS)
    assert summary.spoken == (HELLO, PRESS)
    assert summary.written == "Caller: +39021\nCampaign: acme"


def test_long_calls_are_told_by_their_beginning_and_their_end() -> None:
    record = call(*(turn(f"sentence number {number}") for number in range(9)), turn("word " * 40))
    spoken = summarise(record, HELLO, PRESS).spoken
    assert len(spoken) == 4 and "number zero" in spoken[1] and len(spoken[2].split()) < 22


def test_withheld_number_and_unknown_order_are_said_as_they_are() -> None:
    record = call(tools=(tool("look_up_order", "done", {"content": "status not_found"}, order_number="99999"),), ani="")
    assert "Caller: number withheld" in summarise(record, HELLO, PRESS).written
    assert "Found: order 99999 was not found" in summarise(record, HELLO, PRESS).written
