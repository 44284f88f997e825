"""Calls that we place for a campaign, also to programs nobody here wrote: answered, busy, nobody there, refused; what
is not allowed never leaves the machine. users.md L8."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

pytest.importorskip("pjsua2")

from agent.dial_socket import Dialled, NotDialled  # noqa: E402
from agent.raw_sip_peer import RawPeer, header  # noqa: E402
from tests.live.baresip import baresip, silence  # noqa: E402
from tests.live.lines_campaign import CallingStack, calling_stack, has_heard  # noqa: E402
from tests.live.lines_peers import free_port, sipp_callee  # noqa: E402
from tests.live.stack import ENVIRONMENT  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.asyncio(loop_scope="module")]
NO_ANSWER_S = 3.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[CallingStack]:
    """No answer for 3 s is no answer here, so that the test need not wait 45."""
    trunks = [
        {"name": "dead", "hosts": ["127.0.0.1:9"], "failover_s": 1.0},
        {"name": "live", "hosts": [f"127.0.0.1:{free_port()}"], "failover_s": 1.0},
    ]
    telephony = {"no_answer_timeout_s": NO_ANSWER_S, "trunks": trunks, "allowed_sources": ["127.0.0.0/8"]}
    async with calling_stack(tmp_path_factory.mktemp("stack"), {"telephony": telephony}) as running:
        yield running


def trunk_port(stack: CallingStack) -> int:
    return int(stack.config.telephony.trunks[1].hosts[0].rpartition(":")[2])


class Callee:
    """Somebody with a telephone that answers each INVITE as told."""

    def __init__(self, stack: CallingStack) -> None:
        self.peer = RawPeer(stack.address)
        self.peer.socket.settimeout(15)
        self.uri = f"sip:desk@127.0.0.1:{self.peer.port}"

    async def invited(self) -> str:
        return await asyncio.to_thread(self.peer.receive, "INVITE")


@pytest.fixture
def new_callee(stack: CallingStack) -> Iterator[Callable[[], Callee]]:
    made: list[Callee] = []

    def make() -> Callee:
        made.append(Callee(stack))
        return made[-1]

    yield make
    for callee in made:
        callee.peer.close()


@pytest.mark.peers("baresip")
async def test_call_out_is_answered_by_baresip_and_hears_the_campaigns_own_greeting(
    stack: CallingStack, tmp_path: Path
) -> None:
    port = free_port()
    with baresip(tmp_path / "callee", silence(60), user="ann", port=port, quits_after_s=60) as peer:
        dialled = await stack.dial(uri=f"sip:ann@127.0.0.1:{port}", actor="test")
        assert isinstance(dialled, Dialled) and dialled.is_new
        await stack.until(lambda call: has_heard(call, "i am calling about your order"), dialled.call_id)
        peer.press("b")  # hangs up
        call = await stack.closed(dialled.call_id)
    assert (call["direction"], call["disposition"], call["campaign"]) == ("outbound", "completed", "acme")
    assert call["did"] == f"sip:ann@127.0.0.1:{port}" and call["ani"] == "+390299999"
    assert call["answered_at"] and call["notice_end_sample"] is not None and call["recording"]
    first = call["turns"][0]["heard_text"]
    assert "automated assistant" in first  # the notice comes before everything else


@pytest.mark.peers("sipp")
async def test_call_out_by_number_goes_on_to_the_trunk_that_answers(stack: CallingStack, tmp_path: Path) -> None:
    """SIPp answers as the second trunk; the first one's host is dead."""
    callee = tmp_path / "callee"
    callee.mkdir()
    with sipp_callee(callee, trunk_port(stack)):
        dialled = await stack.dial(number="+390212345")
        assert isinstance(dialled, Dialled)
        call = await stack.until(lambda call: call["answered_at"], dialled.call_id)
        assert call["did"] == "+390212345"
    await stack.closed(dialled.call_id)


@pytest.mark.parametrize(
    ("status", "disposition", "cause"),
    [
        ("486 Busy Here", "busy", "busy"),
        ("603 Decline", "rejected", "rejected"),
        ("404 Not Found", "rejected", "not_found"),
        ("480 Temporarily Unavailable", "no_answer", "no_answer"),
        ("302 Moved Temporarily", "rejected", "redirected"),
        ("", "no_answer", "no_answer"),  # rings and rings
    ],
)
async def test_call_out_that_is_not_answered_is_filed_by_its_sip_cause(
    status: str, disposition: str, cause: str, stack: CallingStack, new_callee: Callable[[], Callee]
) -> None:
    callee = new_callee()
    dialled = await stack.dial(uri=callee.uri)
    invite = await callee.invited()
    assert header(invite, "From").startswith("<sip:+390299999@")
    callee.peer.respond(invite, status or "180 Ringing")
    if not status:
        cancel = await asyncio.to_thread(callee.peer.receive, "CANCEL")
        callee.peer.respond(cancel, "200 OK")
        callee.peer.respond(invite, "487 Request Terminated")
    assert isinstance(dialled, Dialled)
    call = await stack.closed(dialled.call_id)
    assert (call["disposition"], call["cause"], call["answered_at"]) == (disposition, cause, None)
    (ended,) = [event for event in stack.events_of(dialled.call_id) if event["kind"] == "leg_ended"]
    assert ended["payload"]["sip_status"] == int(status.split()[0] if status else 487)
    assert not call["turns"]


async def test_call_that_is_sent_elsewhere_goes_nowhere_else(
    stack: CallingStack, new_callee: Callable[[], Callee]
) -> None:
    """Toll fraud: whoever is called must not choose whom we pay for, in reach of `outbound_hosts` or not."""
    callee, elsewhere = new_callee(), new_callee()
    dialled = await stack.dial(uri=callee.uri)
    invite = await callee.invited()
    contacts = f"Contact: <{elsewhere.uri}>, <sip:+881@192.0.2.1>;q=0.5\r\n"
    callee.peer.respond(invite, "300 Multiple Choices", headers=contacts)
    assert isinstance(dialled, Dialled)
    call = await stack.closed(dialled.call_id)
    assert (call["disposition"], call["cause"], call["answered_at"]) == ("rejected", "redirected", None)
    elsewhere.peer.socket.settimeout(1.0)
    with pytest.raises(TimeoutError):
        await elsewhere.invited()


async def test_what_is_not_allowed_is_refused_before_a_packet_leaves_and_leaves_no_row(stack: CallingStack) -> None:
    before = len(stack.calls())
    refusals = {
        "unknown_campaign": {"campaign": "nobody", "number": "+390212345"},
        "not_allowed": {"number": "+49301234"},  # no prefix of the campaign
        "bad_target": {"uri": "sip:ann@192.0.2.1"},  # not in telephony.outbound_hosts
    }
    for code, wanted in refusals.items():
        answer = await stack.dial(**wanted)
        assert isinstance(answer, NotDialled) and answer.code == code, answer
    for injection in ("sip:ann@127.0.0.1?Replaces=x", "sip:ann@127.0.0.1>\r\nEvil: 1", "tel:+39"):
        answer = await stack.dial(uri=injection)
        assert isinstance(answer, NotDialled) and answer.code == "bad_target"
    await asyncio.sleep(0.3)
    assert len(stack.calls()) == before


async def test_L8_one_request_is_one_invite_however_often_it_is_asked(
    stack: CallingStack, new_callee: Callable[[], Callee]
) -> None:
    """users.md L8: consult leg INVITE cancelled and re-sent."""
    callee = new_callee()
    first = await stack.dial(uri=callee.uri, request_id="order-17")
    invite = await callee.invited()
    again = [await stack.dial(uri=callee.uri, request_id="order-17") for _ in range(3)]
    assert isinstance(first, Dialled) and {answer.call_id for answer in again} == {first.call_id}
    assert not any(answer.is_new for answer in again)
    callee.peer.respond(invite, "486 Busy Here")
    await stack.closed(first.call_id)
    before = len(stack.calls())
    after = await stack.dial(uri=callee.uri, request_id="order-17")  # also when it is over
    await asyncio.sleep(0.3)
    assert isinstance(after, Dialled) and not after.is_new and len(stack.calls()) == before


async def test_no_more_calls_than_lines_and_the_refusal_says_when_to_try_again(
    stack: CallingStack, new_callee: Callable[[], Callee]
) -> None:
    callees, invites = [new_callee() for _ in range(3)], list[str]()
    for callee in callees:
        assert isinstance(await stack.dial(uri=callee.uri), Dialled)
        invites.append(await callee.invited())
        callee.peer.respond(invites[-1], "180 Ringing")
    answer = await stack.dial(uri=callees[0].uri)
    assert isinstance(answer, NotDialled) and answer.code == "busy" and answer.retry_after_s > 0
    for callee, invite in zip(callees, invites, strict=True):
        callee.peer.respond(await asyncio.to_thread(callee.peer.receive, "CANCEL"), "200 OK")
        callee.peer.respond(invite, "487 Request Terminated")
    async with asyncio.timeout(30):
        while any(call["state"] == "open" for call in stack.calls()):  # noqa: ASYNC110 - other processes change it
            await asyncio.sleep(0.2)


async def test_the_command_line_dials_waits_and_tells_by_its_exit_status(
    stack: CallingStack, new_callee: Callable[[], Callee], tmp_path: Path
) -> None:
    callee = new_callee()
    settings = tmp_path / "cli.toml"
    settings.write_text(f'[storage]\nfolder = "{stack.folder / "var"}"\n')
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent", "dial", callee.uri, "--campaign", "acme", "--wait", "--config", str(settings),
        env=ENVIRONMENT, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    callee.peer.respond(await callee.invited(), "486 Busy Here")
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    shown = json.loads(out)
    assert process.returncode == 1 and (shown["disposition"], shown["direction"]) == ("busy", "outbound")
