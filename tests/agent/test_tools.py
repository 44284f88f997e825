"""Tools: what a model may ask for, and when its wish becomes deed."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.events import CommitTool, RunTool, ToolFinished
from agent.tools.catalogue import BadArguments, CallFrame, refusal_line, validate
from agent.tools.desk import ToolDesk
from agent.tools.shop import Shop
from minmo_runtime.api import ToolCallRequested, ToolResult
from storage.calls import CallStore
from storage.config import StorageConfig

FRAME = CallFrame(order_digits=5, today=0)
ALL = ("look_up_order", "opening_hours", "change_delivery", "transfer", "hang_up", "request_callback")
NOW = dt.datetime(2026, 1, 5, 12, tzinfo=dt.UTC)


@pytest.mark.parametrize("number", ["45612", "45 612", "4-5-6-1-2"])
def test_number_is_brought_to_one_form(number: str) -> None:
    assert validate("look_up_order", {"order_number": number}, ALL, FRAME) == {"order_number": "45612"}


@pytest.mark.parametrize(("asked", "keys"), [("1 2, 3#", "123#"), ("*a", "*A"), ("1" * 16, "1" * 16)])
def test_keys_are_those_of_a_telephone(asked: str, keys: str) -> None:
    assert validate("send_keys", {"keys": asked}, ("send_keys",), FRAME) == {"keys": keys}


@pytest.mark.parametrize("asked", ["", "e", "1" * 17, "12w", "٣"])
def test_other_keys_and_too_many_are_refused(asked: str) -> None:
    with pytest.raises(BadArguments):
        validate("send_keys", {"keys": asked}, ("send_keys",), FRAME)


def test_argument_the_model_leaves_out_is_the_claim_of_that_name_and_checked_as_any_other() -> None:
    claimed = CallFrame(order_digits=5, today=0, claims={"order_number": "45 612", "customer_id": "c-17"})
    assert validate("look_up_order", {}, ALL, claimed) == {"order_number": "45612"}
    assert validate("look_up_order", {"order_number": "11111"}, ALL, claimed) == {"order_number": "11111"}
    with pytest.raises(BadArguments):
        validate("look_up_order", {}, ALL, CallFrame(order_digits=5, today=0, claims={"order_number": "all of them"}))


@pytest.mark.parametrize("number", ["", "4561", "456123", "4561x", "४५६१२", "45612; drop table orders"])
def test_number_of_another_form_is_refused(number: str) -> None:
    with pytest.raises(BadArguments) as caught:
        validate("look_up_order", {"order_number": number}, ALL, FRAME)
    assert refusal_line("look_up_order", caught.value) == "status not_found"


@pytest.mark.parametrize(("asked", "day"), [("Monday", "monday"), ("today", "monday"), ("tomorrow", "tuesday")])
def test_day_is_a_weekday(asked: str, day: str) -> None:
    assert validate("opening_hours", {"day": asked}, ALL, FRAME) == {"day": day}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("charge", {}),
        ("opening_hours", {"day": "someday"}),
        ("hang_up", {"now": "yes"}),
        ("change_delivery", {"day": "friday"}),
    ],
)
def test_what_no_tool_takes_is_refused(name: str, arguments: dict[str, str]) -> None:
    with pytest.raises(BadArguments):
        validate(name, arguments, ALL, FRAME)


def test_tool_that_the_campaign_does_not_allow_is_refused() -> None:
    with pytest.raises(BadArguments, match="no tool"):
        validate("transfer", {}, ("look_up_order",), FRAME)


# ----------------------------------------------------------------------- two phases


def ask(name: str, turn_id: str = "a1", **arguments: str) -> ToolCallRequested:
    return ToolCallRequested(call_id="c", turn_id=turn_id, tool_call_id=f"{turn_id}/1", name=name, arguments=arguments)


@pytest.fixture
def desk() -> ToolDesk:
    return ToolDesk("c", ALL, FRAME)


def states(actions: list[object]) -> list[str]:
    return [a.arguments["state"] for a in actions if hasattr(a, "arguments") and "state" in a.arguments]


def test_look_up_runs_at_once_and_answers(desk: ToolDesk) -> None:
    actions = desk.request(ask("look_up_order", order_number="45612"))
    assert states(actions) == ["requested"] and isinstance(actions[-1], RunTool)
    actions = desk.finished(ToolFinished("a1/1", "status shipped day monday"))
    assert states(actions) == ["done"] and isinstance(actions[-1], ToolResult)
    assert desk.heard("a1") == []


def test_side_effect_waits_for_the_last_sample(desk: ToolDesk) -> None:
    desk.request(ask("change_delivery", order_number="45612", day="friday"))
    desk.finished(ToolFinished("a1/1", "result changed"))
    assert desk.is_waiting_for("a1") and desk.heard("a2") == []
    assert [tool.name for tool in desk.heard("a1")] == ["change_delivery"]
    assert desk.heard("a1") == []


def test_cut_reply_takes_its_tools_with_it(desk: ToolDesk) -> None:
    desk.request(ask("hang_up"))
    desk.finished(ToolFinished("a1/1", ""))
    assert states(list(desk.cut("a1"))) == ["cancelled"] and desk.heard("a1") == []


def test_result_for_a_cut_reply_goes_nowhere(desk: ToolDesk) -> None:
    desk.request(ask("look_up_order", order_number="45612"))
    desk.cut("a1")
    assert desk.finished(ToolFinished("a1/1", "status shipped day monday")) == []


def test_side_effect_that_was_refused_in_the_check_never_follows(desk: ToolDesk) -> None:
    desk.request(ask("change_delivery", order_number="45612", day="friday"))
    assert states(list(desk.finished(ToolFinished("a1/1", "result too_late", is_ok=False)))) == ["failed"]
    assert desk.heard("a1") == []


# ---------------------------------------------------------------------------- shop


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    store = CallStore(StorageConfig(folder=tmp_path, is_synced=False), is_background=False)
    store.seed_demo_shop()
    store.open_call("c", did="100", ani="1", now=NOW)
    yield Shop(store, "c", "", can_transfer=False)
    store.close()


def test_results_are_in_the_models_line_format(shop: Shop) -> None:
    order = next(o for o in shop.store.list_orders() if o.status == "shipped")
    done = shop.check(RunTool("a1", "t", "look_up_order", {"order_number": order.order_number}))
    assert done.content == f"status {order.status} day {order.day}"
    assert shop.check(RunTool("a1", "t", "opening_hours", {"day": "saturday"})).content == "open ten close four"
    assert shop.check(RunTool("a1", "t", "opening_hours", {"day": "sunday"})).content == "closed"
    assert shop.check(RunTool("a1", "t", "look_up_order", {"order_number": "xxxxx"})).content == "status not_found"
    assert shop.check(RunTool("a1", "t", "transfer", {})).content == "status busy"


def test_delivery_changes_only_in_the_second_phase(shop: Shop) -> None:
    order = next(o for o in shop.store.list_orders() if o.status == "preparing" and o.day != "friday")
    arguments = {"order_number": order.order_number, "day": "friday"}
    assert shop.check(RunTool("a1", "t", "change_delivery", arguments)).content == "result changed"
    found = shop.store.look_up_order(order.order_number)
    assert found is not None and found.day == order.day
    assert shop.commit(CommitTool("a1", "t", "change_delivery", arguments), NOW)[0] == "done"
    found = shop.store.look_up_order(order.order_number)
    assert found is not None and found.day == "friday"


def test_shipped_order_is_too_late_to_change(shop: Shop) -> None:
    order = next(o for o in shop.store.list_orders() if o.status == "shipped")
    done = shop.check(RunTool("a1", "t", "change_delivery", {"order_number": order.order_number, "day": "friday"}))
    assert (done.content, done.is_ok) == ("result too_late", False)
