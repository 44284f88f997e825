"""Messages bent out of valid ones, in and out of dialogs, from a source that may call us: what a worker must outlive.

    python -m tests.telephony.sip_fuzz --seeds 1-10 --seconds 60

runs each seed against a worker of its own while a live call goes on, and prints one line a seed: whether the worker's
process stayed, the live call still carried audio both ways, and a new call was answered; with the last messages when
not. `test_sip_fuzz.py` is one seed of it. A seed fixes what is sent, not when the answers come.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agent.lab import rtp
from agent.raw_sip_peer import PCMU, RawPeer, to_tag
from telephony.client import WorkerClient
from telephony.config import TelephonyConfig
from telephony.leg import Answer, Hold, LegDisconnected, LegError, LegState, Play, Progress, Refer, Reject, Unhold
from telephony.process import WorkerProcess
from tests.telephony.fuzz_words import HEADERS, METHODS, SDP_LINES, STATUSES, bent

CONFIG = TelephonyConfig(
    sip_port=0, transports=("udp", "tcp"), invites_per_s=1000, source_invites_per_s=1000, source_requests_per_s=50000
)  # fmt: skip
_LAST_MESSAGES = 40
_NUM_CALLERS = 4  # the last one answers
_RATE = 8000


class FuzzCaller:
    """Blocking; a call after the other, none of them decent. `sent` gets the messages."""

    def __init__(self, address: str, seed: str, sent: deque[str]) -> None:
        self.random, self.address, self.sent, self.num_sent = random.Random(seed), address, sent, 0

    def run(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            peer = RawPeer(self.address)
            peer.socket.settimeout(0.02)
            try:
                self._call(peer, is_over)
            finally:
                peer.close()

    def _call(self, peer: RawPeer, is_over: Callable[[], bool]) -> None:
        choose = self.random
        dialog = _Dialog(peer, [f"z9hG4bK{choose.getrandbits(40):x}"])
        self._send(dialog, self._request(dialog, "INVITE", is_first=True))
        for _ in range(choose.randrange(1, 12)):
            if is_over():
                break
            self._read(dialog)
            self._send(dialog, self._request(dialog, choose.choice(METHODS)))
        self._read(dialog)
        dialog.end()

    def _read(self, dialog: _Dialog) -> None:
        with contextlib.suppress(TimeoutError):
            message = dialog.peer.socket.recv(65536).decode(errors="replace")
            if message.startswith("SIP/2.0"):
                dialog.note(message)
                if message.startswith("SIP/2.0 200") and self.random.random() < 0.6:
                    dialog.acknowledge(message)
            elif self.random.random() < 0.8:
                self._send(dialog, self._response(dialog, message))

    # -------------------------------------------------------------- messages

    def _request(self, dialog: _Dialog, method: str, is_first: bool = False) -> str:
        choose, peer = self.random, dialog.peer
        if choose.random() < 0.3:
            dialog.branches.append(f"z9hG4bK{choose.getrandbits(40):x}")
        branch = dialog.branches[0] if is_first else choose.choice([*dialog.branches, *dialog.branches, "old", ""])
        tag = "" if is_first else choose.choice([dialog.tag] * 4 + ["", "bogus"])
        named = method if choose.random() < 0.85 else choose.choice(METHODS)
        cseq = 1 if is_first else choose.choice([1, 1, 2, 3, choose.randrange(1, 9), 2**31 - 1, 2**32])
        lines = [
            f"{method} {peer.request_uri} SIP/2.0",
            f"Via: SIP/2.0/{choose.choice(['UDP'] * 9 + ['TCP'])} 127.0.0.1:{peer.port};branch={branch};rport",
            f"Max-Forwards: {choose.choice([70] * 9 + [0])}",
            f"From: <sip:raw@127.0.0.1>;tag={peer.tag if choose.random() < 0.9 else choose.choice(['', 'other'])}",
            f"To: <{peer.to_uri}>{';tag=' + tag if tag else ''}",
            f"Call-ID: {peer.call_id if choose.random() < 0.95 else 'x'}",
            f"CSeq: {cseq} {named}",
            f"Contact: <sip:raw@127.0.0.1:{peer.port}>",
        ]
        lines += choose.sample(HEADERS, choose.choice([0, 0, 0, 1, 1, 2]))
        return self._whole(lines, self._body(peer, always_sdp=is_first))

    def _response(self, dialog: _Dialog, request: str) -> str:
        choose = self.random
        copied = [line for line in request.splitlines() if re.match(r"(Via|From|To|Call-ID|CSeq|Record-Route):", line)]
        if choose.random() < 0.9:
            copied = [
                f"{line};tag={dialog.peer.tag}" if line.startswith("To:") and "tag=" not in line else line
                for line in copied
            ]
        lines = [f"SIP/2.0 {choose.choice(STATUSES)}", *copied, f"Contact: <sip:raw@127.0.0.1:{dialog.peer.port}>"]
        lines += choose.sample(HEADERS, choose.choice([0, 0, 1]))
        has_sdp = request.startswith(("INVITE", "UPDATE"))
        return self._whole(lines, self._body(dialog.peer, always_sdp=has_sdp) if has_sdp else "")

    def _body(self, peer: RawPeer, always_sdp: bool = False) -> str:
        choose = self.random
        if not always_sdp and choose.random() < 0.5:
            return choose.choice(["", "", "Signal=5\r\n", "5", "SIP/2.0 200 OK\r\n", "--b\r\n\r\n", "x" * 3000])
        lines = peer.sdp(PCMU).splitlines()
        for _ in range(choose.choice([0, 0, 0, 1, 1, 2])):
            at = choose.randrange(len(lines))
            lines[at : at + choose.randrange(2)] = [choose.choice(SDP_LINES).format(port=peer.media.getsockname()[1])]
        body = "\r\n".join(lines) + "\r\n"
        if choose.random() < 0.1:
            kind = choose.choice(["application/sdp", "text/plain"])
            body = f"--b\r\nContent-Type: {kind}\r\n\r\n{body}\r\n--b--\r\n"
        return bent(choose, body) if choose.random() < 0.15 else body

    def _whole(self, lines: list[str], body: str) -> str:
        choose = self.random
        if body and choose.random() < 0.95:
            kind = "multipart/mixed;boundary=b" if body.startswith("--b") else "application/sdp"
            if not body.startswith(("--b", "v=")):
                kind = choose.choice(["application/dtmf", "application/dtmf-relay", "message/sipfrag", "text/plain"])
            lines.append(f"Content-Type: {kind}")
        length = len(body) if choose.random() < 0.95 else choose.choice([0, 1, 9999, -1, len(body) // 2])
        lines.append(f"Content-Length: {length}")
        fate, at = choose.random(), choose.randrange(1, len(lines))
        if fate < 0.08:
            del lines[at]
        elif fate < 0.16:
            lines.insert(choose.randrange(1, len(lines)), lines[at])
        elif fate < 0.2:
            other = choose.randrange(1, len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif fate < 0.23:
            lines[at] = lines[at].partition(":")[0] + ": " + lines[choose.randrange(1, len(lines))].partition(": ")[2]
        text = choose.choice(["\r\n"] * 19 + ["\n"]).join(lines) + "\r\n\r\n" + body
        return bent(choose, text) if choose.random() < 0.1 else text

    def _send(self, dialog: _Dialog, text: str) -> None:
        self.sent.append(text)
        self.num_sent += 1
        data = text.encode("latin-1", "replace")
        if self.random.random() < 0.05:
            dialog.send_by_tcp(data, self.random.randrange(len(data)))
        else:
            with contextlib.suppress(OSError):
                dialog.peer.socket.sendto(data, dialog.peer.target)


@dataclass
class _Dialog:
    """What the fuzzer must know to bend it, and to end it: calls that stay would only fill the worker."""

    peer: RawPeer
    branches: list[str]
    tag: str = ""
    accepted: dict[str, str] = field(default_factory=dict)  # To tag -> 200
    stream: socket.socket | None = None

    def note(self, response: str) -> None:
        self.tag = to_tag(response) or self.tag
        if response.startswith("SIP/2.0 200") and re.search(r"^CSeq:\s*\d+ INVITE", response, re.MULTILINE):
            self.accepted[to_tag(response)] = response

    def acknowledge(self, response: str) -> None:
        found = re.search(r"^CSeq:\s*(\d+) INVITE", response, re.MULTILINE)
        if found and int(found.group(1)) < 2**31:
            self.peer.request("ACK", int(found.group(1)), to_tag(response))

    def end(self) -> None:
        self.peer.request("CANCEL")
        with contextlib.suppress(TimeoutError):
            while True:
                message = self.peer.socket.recv(65536).decode(errors="replace")
                if message.startswith("SIP/2.0"):
                    self.note(message)
        for tag, response in self.accepted.items():
            self.acknowledge(response)
            self.peer.request("BYE", 2**31 - 2, tag)
        if self.stream is not None:
            self.stream.close()

    def send_by_tcp(self, data: bytes, cut: int) -> None:
        with contextlib.suppress(OSError):
            if self.stream is None:
                self.stream = socket.create_connection(self.peer.target, timeout=0.2)
            self.stream.sendall(data[:cut])
            self.stream.sendall(data[cut:])


class FuzzDesk:
    """The agent's side: it answers, refuses, holds, transfers and calls out, as its own seed says."""

    def __init__(self, client: WorkerClient, seed: int) -> None:
        self.client, self.random = client, random.Random(-seed)
        self.legs: list[object] = []
        self.live: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.is_decent = True  # answer everything and leave it in peace: for the live call, and for the last one
        self.serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as group:
            async for leg in self.client.legs():
                group.create_task(self._follow(leg))

    async def _follow(self, leg) -> None:
        if self.is_decent:
            if not self.live.done():
                self.live.set_result(leg)
            await leg.send(Answer(leg_id=leg.leg_id))
            async for _event in leg.events():
                pass
            return
        acting = asyncio.create_task(self._try(leg))
        async for event in leg.events():
            if isinstance(event, LegDisconnected):
                break
        acting.cancel()
        await asyncio.gather(acting, return_exceptions=True)

    async def _try(self, leg) -> None:
        with contextlib.suppress(LegError):  # not possible in its state, or the party was faster
            await self._act(leg)
        leg.hang_up()

    async def _act(self, leg) -> None:
        choose = self.random
        if leg.direction == "inbound":
            first = choose.choices(["answer", "early", "reject", "nothing"], [7, 2, 1, 1])[0]
            if first == "reject":
                await leg.send(Reject(leg_id=leg.leg_id, sip_status=486))
            if first == "early":
                await leg.send(Progress(leg_id=leg.leg_id))
                await asyncio.sleep(choose.random() * 0.1)
            if first in ("answer", "early"):
                await leg.send(Answer(leg_id=leg.leg_id))
        for _ in range(choose.randrange(3)):
            await asyncio.sleep(choose.random() * 0.3)
            await leg.send(choose.choice([
                Hold(leg_id=leg.leg_id), Unhold(leg_id=leg.leg_id), Progress(leg_id=leg.leg_id),
                Refer(leg_id=leg.leg_id, refer_to="sip:a@127.0.0.1"),
                Play(leg_id=leg.leg_id, item_id="x", pcm=bytes(3200), sample_rate_hz=_RATE, is_final=True),
            ]))  # fmt: skip
        await asyncio.sleep(choose.random() * 0.5)

    async def call_out(self, port: int) -> None:
        with contextlib.suppress(Exception):  # no call is free just now
            leg = await self.client.place_call(f"sip:100@127.0.0.1:{port}")
            self.random.random()
            await self._follow(leg)


class FuzzCallee:
    """A party that we call, and whose answers are no better."""

    def __init__(self, caller: FuzzCaller) -> None:
        self.caller, self.peer = caller, RawPeer(caller.address)
        self.peer.socket.settimeout(0.2)

    def run(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            with contextlib.suppress(TimeoutError):
                message = self.peer.socket.recv(65536).decode(errors="replace")
                dialog = _Dialog(self.peer, [])
                if not message.startswith(("SIP/2.0", "ACK")):
                    for _ in range(self.caller.random.randrange(1, 3)):
                        self.caller._send(dialog, self.caller._response(dialog, message))
                if message.startswith(("BYE", "CANCEL")):
                    self.peer.respond(message, "200 OK")
        self.peer.close()


@dataclass
class Verdict:
    """What is left after the fuzz. `loudest_*`: of the live call, at its two ends."""

    seed: int
    num_sent: int = 0
    exit_status: int | None = None
    is_live: bool = False
    num_rtp_out: int = 0
    loudest_in: int = 0
    loudest_out: int = 0
    is_new_call_answered: bool = False
    last: list[str] = field(default_factory=list)
    stderr: str = ""

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {'good' if self.is_good else 'BAD'}: {self.num_sent} messages, "
            f"exit {self.exit_status}, live {self.is_live}, loudest in/out {self.loudest_in}/{self.loudest_out}, "
            f"{self.num_rtp_out} packets, new call answered {self.is_new_call_answered}"
        )

    @property
    def is_good(self) -> bool:
        has_audio = self.loudest_in > 1000 and self.loudest_out > 1000
        return self.exit_status is None and self.is_live and has_audio and self.is_new_call_answered


async def run(seed: int, seconds: float) -> Verdict:
    """One worker, one live call, `seconds` of fuzz, and what is left."""
    verdict = Verdict(seed)
    with tempfile.TemporaryFile() as log:
        with await asyncio.to_thread(WorkerProcess, CONFIG, log) as worker:
            with contextlib.suppress(Exception if worker.poll() is not None else TimeoutError):
                await _fuzz(worker, verdict, seconds)
            verdict.exit_status = worker.poll()
        if not verdict.is_good:
            log.seek(0)
            verdict.stderr = log.read()[-3000:].decode(errors="replace")
    return verdict


async def _fuzz(worker: WorkerProcess, verdict: Verdict, seconds: float) -> None:
    client = await WorkerClient.connect(worker.socket_path)
    desk = FuzzDesk(client, verdict.seed)
    live = RawPeer(worker.address)
    talking: list[asyncio.Task[None]] = []
    try:
        live.invite()
        ok = await asyncio.to_thread(live.final)
        live.request("ACK", to_tag=to_tag(ok))
        leg = await desk.live
        talking += [asyncio.create_task(_caller_sounds(live, ok)), asyncio.create_task(_agent_sounds(leg))]
        desk.is_decent = False
        sent = deque[str](maxlen=_LAST_MESSAGES)
        callers = [FuzzCaller(worker.address, f"{verdict.seed}/{number}", sent) for number in range(_NUM_CALLERS)]
        await _bother(worker, desk, callers, seconds)
        verdict.num_sent, verdict.last = sum(caller.num_sent for caller in callers), list(sent)
        if worker.poll() is not None:
            return
        desk.is_decent = True
        await _listen(live, leg, verdict)
        verdict.is_live = leg.state is LegState.CONFIRMED
        verdict.is_new_call_answered = await asyncio.to_thread(_can_call, worker.address)
    finally:
        for task in talking:
            task.cancel()
        live.close()
        await client.close()
        await asyncio.gather(desk.serving, *talking, return_exceptions=True)


async def _bother(worker: WorkerProcess, desk: FuzzDesk, callers: list[FuzzCaller], seconds: float) -> None:
    ends_at_s = time.monotonic() + seconds
    callee = FuzzCallee(callers[-1])

    def is_over() -> bool:
        return time.monotonic() > ends_at_s or worker.poll() is not None

    threads = [asyncio.create_task(asyncio.to_thread(party.run, is_over)) for party in (*callers[:-1], callee)]
    calling: set[asyncio.Task[None]] = set()
    while not is_over():
        task = asyncio.create_task(desk.call_out(callee.peer.port))
        calling.add(task)
        task.add_done_callback(calling.discard)
        await asyncio.sleep(1.0)
    await asyncio.gather(*threads)
    for task in list(calling):
        task.cancel()


_TONE = (np.sin(2 * np.pi * 440 * np.arange(_RATE) / _RATE) * 8000).astype("<i2")  # a second


async def _caller_sounds(live: RawPeer, ok: str) -> None:
    media = next(line for line in ok.splitlines() if line.startswith("m=audio"))
    target, sequence = ("127.0.0.1", int(media.split()[1])), 0
    payload = rtp.encode(rtp.PCMU, _TONE)
    while True:
        at = sequence % 50 * 160
        packet = rtp.RtpPacket(rtp.PCMU, sequence & 0xFFFF, sequence * 160, 7, payload[at : at + 160], False)
        live.media.sendto(rtp.build(packet), target)
        sequence += 1
        await asyncio.sleep(0.02)


async def _agent_sounds(leg: Any) -> None:
    second = 0
    while True:
        second += 1
        await leg.send(Play(
            leg_id=leg.leg_id, item_id=f"tone-{second}", pcm=_TONE.tobytes(), sample_rate_hz=_RATE, is_final=True
        ))  # fmt: skip
        await asyncio.sleep(0.95)


async def _listen(live: RawPeer, leg: Any, verdict: Verdict) -> None:
    """Two seconds of the live call, at both of its ends."""
    heard = bytearray()
    leg.set_tap(lambda _start, received, _sent: heard.extend(received))
    live.media.setblocking(False)
    _waiting(live.media)  # what came before does not count
    await asyncio.sleep(2.0)
    packets = _waiting(live.media)
    sound = b"".join(packet[12:] for packet in packets if packet[1] & 0x7F == rtp.PCMU)
    verdict.num_rtp_out = len(packets)
    verdict.loudest_out = _loudest(rtp.DECODE[rtp.PCMU][np.frombuffer(sound, np.uint8)])
    verdict.loudest_in = _loudest(np.frombuffer(bytes(heard), "<i2"))


def _waiting(media: socket.socket) -> list[bytes]:
    packets: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while True:
            packets.append(media.recv(2048))
    return packets


def _loudest(samples: Any) -> int:
    return int(np.abs(samples.astype(np.int32)).max()) if len(samples) else 0


def _can_call(address: str) -> bool:
    """Calls of the fuzz whose ACK never came are given up after 64*T1 (RFC 3261 §13.3.1.4); until then: 503."""
    gives_up_at_s = time.monotonic() + 75  # and a busy machine
    while time.monotonic() < gives_up_at_s:
        peer = RawPeer(address)
        peer.socket.settimeout(2)
        try:
            peer.invite()
            with contextlib.suppress(TimeoutError):
                answer = peer.final()
                peer.request("ACK", to_tag=to_tag(answer))
                if answer.startswith("SIP/2.0 200"):
                    peer.request("BYE", 2, to_tag(answer))
                    return True
        finally:
            peer.close()
        time.sleep(0.5)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1-10", help="FIRST-LAST")
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    first, _, last = options.seeds.partition("-")
    num_bad = 0
    for seed in range(int(first), int(last or first) + 1):
        verdict = asyncio.run(run(seed, options.seconds))
        num_bad += not verdict.is_good
        print(verdict, flush=True)
        if not verdict.is_good:
            print(verdict.stderr, *verdict.last[-6:], sep="\n----\n", flush=True)
    sys.exit(min(num_bad, 1))


if __name__ == "__main__":
    main()
