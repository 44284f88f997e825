"""A call's RTP comes from one source, from its first packet on; everything else is kept out of pjmedia and looked at.

Beside pjmedia's RTP socket stands one of ours at the same port. The kernel gives packets of the call's own source to
pjmedia and all others to ours (sip/packet_filter.py), where they are read and counted: so it is known who forges. The
own source is, in this order:

1. the address and port that the party's SDP names (RFC 3264 §5.1): from the start, and whenever it sends;
2. as long as that one was never heard, a source that may send to us and has sent a run of RTP of the negotiated format
   under one SSRC: symmetric RTP (RFC 4961) of a party behind NAT, which sends from elsewhere than its SDP can say.

Who can send from the party's own address and port is not kept out: that takes SRTP (RFC 3711). RTCP is taken from the
own source's address. A re-INVITE begins anew.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from telephony.sip import packet_filter

RUN_PACKETS = 10  # as many as pjmedia itself wants before it leaves one source for another
_RUN_POLLS = 4  # and not all at once
_MAX_GAP = 50  # packets lost within a run
_MAX_RUNS = 32  # sources followed at once
_PER_POLL = 64  # packets looked at in one turn; the kernel throws the rest away
_BUFFER_BYTES = 1 << 17
_RTP_HEADER_BYTES = 12

COMFORT_NOISE_PT = 13  # RFC 3389; needs no negotiation

MaySend = Callable[[str], bool]
"""Is RTP of this IP address possible at all?"""
SecurityNote = Callable[[str, str, str, int], None]
"""(kind, source, detail, count): see wire.SecurityEvent."""


@dataclass(frozen=True)
class RtpWatch:
    """What all legs of an endpoint share."""

    may_send: MaySend
    note: SecurityNote


class Verdict(Enum):
    OWN = "own"
    UNDECIDED = "undecided"
    STRANGER = "stranger"


@dataclass
class _Run:
    """Packets of one source that follow each other."""

    ssrc: bytes
    last_sequence: int
    num_packets: int = 1
    num_polls: int = 1
    last_poll: int = 0


class OwnSource:
    """Which source is the call's own. No socket: told of every packet that was kept out."""

    def __init__(self, promised: str, payload_types: frozenset[int], may_send: MaySend) -> None:
        self.promised = self.address = promised  # "ip:port"
        self.is_heard = False  # `address` has sent: only `promised` can still take its place
        self._payload_types, self._may_send = payload_types, may_send
        self._runs: dict[str, _Run] = {}

    def judge(self, source: str, packet: bytes, poll: int) -> Verdict:
        """Of a packet from another source than `address`; OWN = that one is the call's own from now on."""
        if not self._is_of_the_call(packet):
            return Verdict.STRANGER
        if source != self.promised:
            if self.is_heard or not self._may_send(host_of(source)):
                return Verdict.STRANGER
            if not self._has_run(source, packet, poll):
                return Verdict.UNDECIDED
        self.address, self.is_heard = source, True
        self._runs.clear()
        return Verdict.OWN

    def _is_of_the_call(self, packet: bytes) -> bool:
        """RTP version 2 (RFC 3550 §5.1) of a negotiated payload type."""
        return len(packet) > _RTP_HEADER_BYTES and packet[0] >> 6 == 2 and packet[1] & 0x7F in self._payload_types

    def _has_run(self, source: str, packet: bytes, poll: int) -> bool:
        ssrc, sequence = packet[8:12], int.from_bytes(packet[2:4], "big")
        run = self._runs.get(source)
        if run is None or run.ssrc != ssrc or not 0 < (sequence - run.last_sequence) & 0xFFFF <= _MAX_GAP:
            if len(self._runs) >= _MAX_RUNS:
                self._runs.clear()
            self._runs[source] = _Run(ssrc, sequence, last_poll=poll)
            return False
        run.num_packets += 1
        run.num_polls += poll != run.last_poll
        run.last_sequence, run.last_poll = sequence, poll
        return run.num_packets >= RUN_PACKETS and run.num_polls >= _RUN_POLLS


class RtpLock:
    """One leg's sockets. Everything on the main thread."""

    def __init__(self) -> None:
        self.own: OwnSource | None = None  # while locked
        self._fds: list[tuple[int, int]] = []  # (descriptor, inode): pjsip may have closed it, and the number be reused
        self._local_port = 0
        self._trap: socket.socket | None = None
        self._polls = 0

    def close_to(self, local_port: int, own: OwnSource) -> None:
        """Only this source is heard at `local_port`."""
        if self._trap is None or local_port != self._local_port or not all(_is_same(*fd) for fd in self._fds):
            self.open()
            rtp = packet_filter.find_socket(local_port, socket.SOCK_DGRAM)
            rtcp = packet_filter.find_socket(local_port + 1, socket.SOCK_DGRAM)
            if rtp < 0:
                return
            self._trap = packet_filter.socket_beside(rtp, _BUFFER_BYTES)
            self._fds = [(fd, os.fstat(fd).st_ino) for fd in (rtp, rtcp) if fd >= 0]
            self._local_port = local_port
        self.own = own
        self._apply()

    def poll(self) -> Counter[str]:
        """Look at what was kept out: strangers' packets, by "ip:port"."""
        strangers: Counter[str] = Counter()
        if self._trap is None or self.own is None:
            return strangers
        self._polls += 1
        for _ in range(_PER_POLL):
            try:
                packet, (host, port, *_) = self._trap.recvfrom(256)
            except OSError:  # nothing more
                break
            source = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            if source == self.own.address:  # it came before the filter was changed
                continue
            verdict = self.own.judge(source, packet, self._polls)
            if verdict is Verdict.OWN:
                self._apply()
            strangers[source] += verdict is Verdict.STRANGER
        return +strangers

    def open(self) -> None:
        for fd, inode in self._fds[1:]:
            if _is_same(fd, inode):
                packet_filter.detach(fd)
        if self._trap is not None:
            self._trap.close()  # pjmedia's socket is alone at its port again and gets everything
        self._fds, self._trap, self.own = [], None, None

    def _apply(self) -> None:
        assert self.own is not None
        host, _, port = self.own.address.rpartition(":")
        (rtp, inode), *others = self._fds
        if _is_same(rtp, inode):
            packet_filter.steer(rtp, packet_filter.from_one_source(host.strip("[]"), int(port), 0, 1))
        for rtcp, inode in others:
            if _is_same(rtcp, inode):
                packet_filter.attach(rtcp, packet_filter.from_one_source(host.strip("[]"), 0))


def host_of(source: str) -> str:
    """The address of "ip:port"."""
    return source.rpartition(":")[0].strip("[]")


def _is_same(fd: int, inode: int) -> bool:
    with contextlib.suppress(OSError):
        return os.fstat(fd).st_ino == inode
    return False
