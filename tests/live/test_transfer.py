"""A caller who wants a person, over real SIP: the REFER goes out verbatim, and what becomes of it is said and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pjsua2")

from tests.live.baresip import baresip, silence  # noqa: E402
from tests.live.served import Served, ask, tools_of, wait_for, what_was  # noqa: E402
from tests.live.sipp import errors_of, play, referred_scenario, sipp  # noqa: E402
from tests.live.speech import clip  # noqa: E402

pytestmark = [pytest.mark.live]
GREETED_MS = 9_000  # as in test_sipp.py


def refer_results(served: Served, call: dict[str, Any]) -> list[int]:
    events = served.events_of(call["call_id"])
    return [event["payload"]["sip_status"] for event in events if event["kind"] == "refer_result"]


@pytest.mark.peers("baresip")
def test_caller_who_asks_for_a_person_is_transferred_by_baresip_to_the_desk(served: Served, tmp_path: Path) -> None:
    """Two baresips: the caller carries the transfer out, the desk answers it."""
    port = int(served.handoff_uri.rpartition(":")[2])
    with (
        baresip(tmp_path / "desk", silence(120), user="desk-7", port=port, quits_after_s=170) as desk,
        baresip(tmp_path / "b", silence(170), f"sip:100@{served.address}", user="tom", quits_after_s=170) as peer,
    ):
        wait_for(lambda: served.has_said("tom", "how can i help you"), 60, "no greeting")
        ask(served, peer, "tom", clip("person"), "connect")
        call = served.closed_call_of("tom", 60)
        wait_for(lambda: "Call established" in desk.text(), 10, "the desk was not called")
    assert "speak to a person" in what_was(call, "caller")
    assert [tool["state"] for tool in tools_of(call, "transfer")] == ["done"]
    assert call["disposition"] == "transferred" and refer_results(served, call) == [200]
    assert "sip:tom@" in desk.text()


@pytest.mark.peers("sipp")
@pytest.mark.parametrize(
    ("answer", "outcome", "status"), [("603 Decline", "", 603), ("202 Accepted", "486 Busy Here", 486)]
)
def test_transfer_that_fails_is_said_and_a_callback_is_stored(
    answer: str, outcome: str, status: int, served: Served, tmp_path: Path
) -> None:
    """SIPp goes on only if the REFER's target is the configured one, character by character."""
    scenario = referred_scenario(served.handoff_uri, answer, outcome)
    for user in (f"val{status}", f"val{status}b"):  # SIPp says it once: a starved encoder may miss a word of it
        call = call_of_sipp(served, tmp_path, scenario, user)
        if call is not None:
            break
    assert call is not None, errors_of(tmp_path)
    assert refer_results(served, call) == [status]
    assert "no one is free right now. we will call you" in what_was(call, "agent")  # SIPp hangs up after a fixed time
    (request,) = call["callback_requests"]
    assert request["number"] == user and str(status) in request["reason"]
    assert call["disposition"] == "completed"


def call_of_sipp(served: Served, folder: Path, scenario: str, user: str) -> dict[str, Any] | None:
    """Says "i would like to speak to a person" after the greeting, and then what the scenario says. None: it failed."""
    media = play(folder, clip("person"), GREETED_MS)
    options = ("-m", "1", "-recv_timeout", "40000")
    with sipp(folder, served.address, 6_000, media, options, user, scenario, 100) as process:
        wait_for(lambda: process.poll() is not None, 100, "SIPp has not ended")
    return served.closed_call_of(user) if process.returncode == 0 else None
