"""Host names: looked up beside the SIP thread, kept, refreshed; and what a worker does with what it learns.

The worker's resolver is injected: a `sitecustomize` on its PYTHONPATH answers names of `.test` from a folder, one file
a name, its words the addresses. "wait" = no answer until the file says something else.
"""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import RawPeer, header, to_tag  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.sip.names import Names, literal_of, split_host  # noqa: E402
from telephony.sip.trunk import Neighbours  # noqa: E402
from telephony.trunk_config import TrunkConfig  # noqa: E402
from tests.live.lines_peers import line  # noqa: E402
from tests.live.sip_agent import until  # noqa: E402

INJECTED = """
import pathlib, socket, time
FOLDER, real = pathlib.Path({folder!r}), socket.getaddrinfo
def getaddrinfo(host, *rest, **named):
    if not str(host).endswith(".test"):
        return real(host, *rest, **named)
    path = FOLDER / host
    while path.is_file() and path.read_text() == "wait":
        time.sleep(0.05)
    if not path.is_file():
        raise socket.gaierror(-2, "Name or service not known")
    return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (address, 0)) for address in path.read_text().split()]
socket.getaddrinfo = getaddrinfo
"""


@pytest.fixture
def dns(tmp_path, monkeypatch):
    """name, addresses -> None: what DNS says from now on."""
    answers, injected = tmp_path / "answers", tmp_path / "injected"
    answers.mkdir()
    injected.mkdir()
    (injected / "sitecustomize.py").write_text(INJECTED.format(folder=str(answers)))
    monkeypatch.setenv("PYTHONPATH", str(injected))

    def says(name, text):
        (answers / "new").write_text(text)
        (answers / "new").rename(answers / name)

    return says


def trunk(host, **settings):
    return TrunkConfig(**{"name": "carrier", "hosts": (host,), "failover_s": 1.0, **settings})


def bound(address, port):
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((address, port))
    made.settimeout(5)
    return made


async def state(near, wanted):
    await until(lambda: "carrier" in near.client.trunks and near.client.trunks["carrier"].state == wanted)
    return near.client.trunks["carrier"]


async def test_trunk_whose_name_does_not_resolve_at_start_comes_up_later_and_follows_a_changed_address(dns):
    first, second, caller = RawPeer("127.0.0.1:9", "127.0.0.2"), None, None
    try:
        settings = {"trunks": (trunk(f"carrier.test:{first.port}"),), "dns_refresh_s": 1.0}
        async with line(**settings) as near:
            assert "no address" in (await state(near, "down")).reason
            call = await near.call(number="123")
            assert (await call.ended()).sip_status == 502
            caller = RawPeer(near.address, "127.0.0.2")
            caller.socket.settimeout(0.5)
            caller.invite()  # from the carrier's address to be: nobody knows it yet
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(caller.socket.recv, 4096)

            dns("carrier.test", "127.0.0.2")
            await state(near, "up")
            await near.call(number="123")
            invite = await asyncio.to_thread(first.receive, "INVITE")
            assert invite.startswith(f"INVITE sip:123@carrier.test:{first.port} SIP/2.0")  # its name, not its address
            caller.socket.settimeout(5)
            caller.invite()
            incoming = await near.next_call()
            assert incoming.incoming.trunk == "carrier"
            ok = await asyncio.to_thread(caller.final)
            caller.request("ACK", to_tag=to_tag(ok))
            await incoming.confirmed()
            caller.request("BYE", 2, to_tag=to_tag(ok))
            await incoming.ended()

            second = RawPeer("127.0.0.1:9", "127.0.0.3")
            second.socket.close()
            second.socket = bound("127.0.0.3", first.port)
            dns("carrier.test", "127.0.0.3")
            late = RawPeer(near.address, "127.0.0.3")  # heard as soon as the new address is known
            late.socket.settimeout(0.5)
            for _ in range(20):
                late.invite()
                try:
                    await asyncio.to_thread(late.receive, "SIP/2.0")
                    break
                except TimeoutError:
                    continue
            late.close()
            await near.call(number="124")
            assert (await asyncio.to_thread(second.receive, "INVITE")).startswith("INVITE sip:124@carrier.test")
    finally:
        for peer in (first, second, caller):
            if peer is not None:
                peer.close()


async def test_dns_that_does_not_answer_stops_neither_the_start_nor_the_calls(dns):
    """One name of two never gets an answer; the other trunk works, and a call there is heard to its end."""
    peer = RawPeer("127.0.0.1:9")
    dns("dead.test", "wait")
    dns("alive.test", "127.0.0.1")
    try:
        trunks = (trunk("dead.test"), trunk(f"alive.test:{peer.port}", name="alive"))
        async with line(trunks=trunks, dns_refresh_s=1.0) as near:
            assert "no address" in (await state(near, "down")).reason
            call = await near.call(number="123", trunks=("alive",))
            invite = await asyncio.to_thread(peer.receive, "INVITE")
            peer.target = ("127.0.0.1", int(near.address.split(":")[1]))
            peer.respond(invite, "200 OK", peer.sdp())
            await asyncio.to_thread(peer.receive, "ACK")
            await call.confirmed()
            dead = await near.call(number="123", trunks=("carrier",))
            assert (await dead.ended()).sip_status == 502
            call.leg.hang_up()
            peer.respond(await asyncio.to_thread(peer.receive, "BYE"), "200 OK")
            await call.ended()
            dns("dead.test", "")  # its thread may end
    finally:
        peer.close()


async def test_name_that_only_a_peers_contact_tells_is_looked_up_while_other_calls_go_on(dns):
    """RFC 3261 §12.2.1.1: the BYE goes to the Contact, whose name nobody configured."""
    dns("phone.test", "wait")
    async with line() as near:
        strange, other = RawPeer(near.address), RawPeer(near.address)
        try:
            body = strange.sdp()
            request = strange.request
            contact = f"<sip:raw@127.0.0.1:{strange.port}>"
            send = strange._send
            strange._send = lambda head, body: send(head.replace(contact, f"<sip:raw@phone.test:{strange.port}>"), body)
            request("INVITE", body=body)
            call = await near.next_call()
            ok = await asyncio.to_thread(strange.final)
            request("ACK", to_tag=to_tag(ok))
            await call.confirmed()
            call.leg.hang_up()  # its BYE waits for DNS
            other.invite()
            second = await near.next_call()
            ok = await asyncio.to_thread(other.final)
            other.request("ACK", to_tag=to_tag(ok))
            await second.confirmed()
            strange.socket.settimeout(0.2)
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(strange.receive, "BYE")
            strange.socket.settimeout(5)
            dns("phone.test", "127.0.0.1")
            bye = await asyncio.to_thread(strange.receive, "BYE")
            assert bye.startswith(f"BYE sip:raw@phone.test:{strange.port} SIP/2.0") and header(bye, "CSeq")
            strange.respond(bye, "200 OK")
            await call.ended()
            other.request("BYE", 2, to_tag=to_tag(ok))
            await second.ended()
        finally:
            strange.close()
            other.close()


# --------------------------------------------------------------------- parts


class FakeDns:
    """Answers by name; an OSError when there are none; counts the questions."""

    def __init__(self, **answers):
        self.answers, self.asked = answers, []
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self, name):
        self.asked.append(name)
        assert self.may_answer.wait(10)
        if name.partition(".")[0] not in self.answers:
            raise OSError("no such name")
        return tuple(self.answers[name.partition(".")[0]])


def settle(names, condition):
    """Poll until something is so: the answers come from other threads."""
    for _ in range(500):
        changed = names.poll()
        if condition():
            return changed
        threading.Event().wait(0.01)
    raise AssertionError("it did not become so")


@pytest.fixture
def started(request):
    made = []

    def start(dns, *hosts, refresh_s=0.05):
        names = Names(hosts, refresh_s, dns)
        made.append(names)
        names.start(5.0)
        return names

    yield start
    for names in made:
        names.stop()


def test_first_answers_are_there_when_the_start_is_over_and_addresses_need_no_dns(started):
    dns = FakeDns(a=["192.0.2.1", "192.0.2.2"])
    names = started(dns, "a.example:5080", "192.0.2.9:5060", "[2001:db8::1]:5061", "b.example")
    assert names.addresses_of("A.example:5080") == ("192.0.2.1", "192.0.2.2") and names.addresses_of("b.example") == ()
    assert names.addresses_of("192.0.2.9:5060") == ("192.0.2.9",)
    assert names.addresses_of("[2001:db8::1]:5061") == ("2001:db8::1",)
    assert set(dns.asked) == {"a.example", "b.example"}


def test_good_answer_stays_when_dns_fails_and_changes_when_it_says_so(started):
    dns = FakeDns(a=["192.0.2.1", "192.0.2.2"])
    names = started(dns, "a.example")
    del dns.answers["a"]
    asked = len(dns.asked)
    settle(names, lambda: len(dns.asked) > asked + 3)
    assert names.addresses_of("a.example") == ("192.0.2.1", "192.0.2.2")
    dns.answers["a"] = ["192.0.2.2", "192.0.2.1"]
    asked = len(dns.asked)
    assert not settle(names, lambda: len(dns.asked) > asked + 3)  # another order is no news
    dns.answers["a"] = ["192.0.2.3"]
    assert settle(names, lambda: names.addresses_of("a.example") == ("192.0.2.3",))


def test_name_of_a_peer_is_asked_for_once_and_all_who_wait_get_the_answer(started):
    dns = FakeDns(c=["192.0.2.5"])
    names, got = started(dns), []
    dns.may_answer.clear()
    for _ in range(3):
        names.ask("c.example", got.append, now_s=100.0)
    assert not names.poll() and got == []
    dns.may_answer.set()
    settle(names, lambda: len(got) == 3)
    names.ask("c.example", got.append, now_s=100.0)
    names.ask("nowhere.example", got.append, now_s=100.0)
    settle(names, lambda: len(got) == 5)
    assert got == [("192.0.2.5",)] * 4 + [()] and dns.asked == ["c.example", "nowhere.example"]


def test_flood_of_names_is_bounded(started):
    dns = FakeDns()
    names, got = started(dns), []
    dns.may_answer.clear()
    for number in range(200):
        names.ask(f"n{number}.example", got.append, now_s=1.0)
    names.poll()
    assert len(dns.asked) <= 64 and got == [()] * 136
    dns.may_answer.set()
    settle(names, lambda: len(got) == 200)


def test_sources_of_a_trunk_are_what_its_name_has_now():
    known = {"sip.example": ()}
    config = TelephonyConfig(trunks=(TrunkConfig(name="t", hosts=("sip.example:5080",)),))
    neighbours = Neighbours(config, lambda host: known.get(split_host(host)[0], literal_of(host)))
    assert neighbours.trunk_of("192.0.2.1:5060") is None
    known["sip.example"] = ("192.0.2.1",)
    neighbours.refresh()
    assert neighbours.trunk_of("192.0.2.1:5060").name == "t"
    known["sip.example"] = ("192.0.2.2",)
    neighbours.refresh()
    assert not neighbours.may_call_us("192.0.2.1:5060") and neighbours.may_call_us("192.0.2.2:5060")
