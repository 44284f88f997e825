"""Callers for the benches of many calls: dial, talk, hear, hang up, all of them from one process.

Each is a `RawPeer` (agent/raw_sip_peer.py) that sends G.711 in real time: a committed clip, then silence, round and
round, the callers spread over the cycle as real ones are. What comes back is stamped by the kernel
(agent/bench_wire.py), so how late this process reads does not matter; how late it sends is what a network does too.
Knows nothing of the agent.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from agent.bench_wire import RTP_HEADER, Arrivals, RtpReader, rtp_address
from agent.lab import rtp
from agent.lab.scenarios import clip
from agent.raw_sip_peer import RawPeer, to_tag

CYCLE_S = 7.5  # one sentence, then silence in which the agent answers
ANSWERED_WITHIN_S = 2.5
_BEFORE_S = 0.2
_PACKET = 160
_PTIME_S = 0.02
_SLOTS = 4  # a packet time is cut into so many; the callers are spread over them
_DIALLED_AT_ONCE = 4
_ANSWERED_WITHIN_S = 20


class Refused(Exception):
    """An INVITE that got no 200; the text is what it got."""


@dataclass
class Caller:
    """One call that is up."""

    peer: RawPeer
    tag: str
    media_address: tuple[str, int]
    arrivals: Arrivals
    dialled_s: float  # from INVITE to 200
    said_s: list[float] = field(default_factory=list)  # when each of its sentences ended

    def answers_s(self, from_s: float, to_s: float) -> list[float | None]:
        """How long each sentence of that time waited for an answer; None: over `ANSWERED_WITHIN_S`. Left out are those
        into which the agent was still speaking, and those too late for an answer to be due."""
        ends = [end for end in self.said_s if from_s + _BEFORE_S <= end < to_s - ANSWERED_WITHIN_S]
        found: list[float | None] = []
        for end in ends:
            packets = self.arrivals.between(end - _BEFORE_S, end + ANSWERED_WITHIN_S)
            if not any(is_loud for at, is_loud in packets if at < end):
                found.append(next((at - end for at, is_loud in packets if is_loud), None))
        return found

    def hang_up(self) -> None:
        self.peer.request("BYE", cseq=2, to_tag=self.tag)


def payloads() -> tuple[list[bytes], int]:
    """One cycle of the caller's voice, mu-law, packet by packet; and the number of the first one after the sentence."""
    speech = np.frombuffer(clip("order_status"), "<i2").astype(float)
    cycle = np.zeros(round(CYCLE_S * rtp.RATE_HZ))
    cycle[: len(speech)] = speech[: len(cycle)]
    codes = rtp.encode(rtp.PCMU, cycle)
    return [codes[at : at + _PACKET] for at in range(0, len(codes), _PACKET)], -(-len(speech) // _PACKET)


class Crowd(threading.Thread):
    """`dial` adds callers, `stop` sends every BYE. The thread is the one that talks."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.callers: list[Caller] = []
        self._refused: list[RawPeer] = []  # the reader still has their sockets
        self.most_late_s = 0.0  # of our own packets: a machine that is too full for the bench itself
        self._reader = RtpReader([])
        self._payloads, self._sentence_packets = payloads()
        self._is_over = False

    def start(self) -> None:
        self._reader.start()
        super().start()

    def dial(self, addresses: list[str]) -> list[str]:
        """One call to each address, some at once; what was said instead of 200, by those that were refused."""
        with ThreadPoolExecutor(_DIALLED_AT_ONCE) as pool:
            found = list(pool.map(self._dial, addresses))
        self.callers += [each for each in found if isinstance(each, Caller)]
        return [each for each in found if isinstance(each, str)]

    def _dial(self, address: str) -> Caller | str:
        peer = RawPeer(address)
        peer.socket.settimeout(_ANSWERED_WITHIN_S)
        arrivals = self._reader.add(peer.media)
        began_s = time.monotonic()
        peer.invite()
        try:
            final = peer.final()
        except TimeoutError:
            self._refused.append(peer)
            return "no answer"
        if not final.startswith("SIP/2.0 200"):
            self._refused.append(peer)
            return final.splitlines()[0]
        dialled_s = time.monotonic() - began_s
        peer.request("ACK", to_tag=to_tag(final))
        return Caller(peer, to_tag(final), rtp_address(final), arrivals, dialled_s)

    def run(self) -> None:
        began_s, slot = time.monotonic(), 0
        while not self._is_over:
            due_s = began_s + slot * _PTIME_S / _SLOTS
            time.sleep(max(0.0, due_s - time.monotonic()))
            self.most_late_s = max(self.most_late_s, time.monotonic() - due_s)
            number = slot // _SLOTS
            for index in range(slot % _SLOTS, len(self.callers), _SLOTS):
                caller = self.callers[index]
                position = (number + index * 37) % len(self._payloads)
                if position == self._sentence_packets:
                    caller.said_s.append(time.time())  # the clock of the kernel's stamps
                header = RTP_HEADER.pack(0x80, 0, number & 0xFFFF, _PACKET * number & 0xFFFFFFFF, 4711 + index)
                caller.peer.media.sendto(header + self._payloads[position], caller.media_address)
            slot += 1

    def stop(self) -> None:
        """The line goes quiet, every call is ended, the sockets are closed."""
        self._is_over = True
        self.join()
        for caller in self.callers:
            caller.hang_up()
        time.sleep(0.5)
        self._reader.stop()
        for peer in (*(caller.peer for caller in self.callers), *self._refused):
            peer.close()
