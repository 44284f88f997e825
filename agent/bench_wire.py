"""The media bench's view of the wire: arrivals of RTP by the kernel's own clock, clicks sent in, CPU time of a process.

One thread reads every socket; when it reads does not matter, because Linux stamps each datagram (SO_TIMESTAMPNS). Knows
nothing of SIP and nothing of what is measured.
"""

from __future__ import annotations

import os
import re
import selectors
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_TIMESTAMP = struct.Struct("qq")
_SO_TIMESTAMPNS = 35  # Linux; not named by Python's socket module
RTP_HEADER = struct.Struct("!BBHII")
_RTP_HEADER_BYTES = 12
_SILENCE, _LOUD = b"\xff" * 160, bytes([0x10, 0x90] * 80)  # mu-law: zero, and a 4 kHz square near full scale
_QUIET = bytes(code for code in range(256) if (code & 0x7F) > 0x70)  # mu-law's quietest codes
_CLICK_EVERY = 25  # packets: half a second


@dataclass
class Arrivals:
    """One call's packets: kernel time, and whether they carried sound."""

    packets: list[tuple[float, bool]] = field(default_factory=list)

    def gaps_ms(self, from_s: float) -> list[float]:
        times = [at for at, _ in self.packets if at >= from_s]
        return [1000 * (after - before) for before, after in zip(times, times[1:], strict=False)]

    def between(self, from_s: float, to_s: float) -> list[tuple[float, bool]]:
        """Its packets of that time."""
        return [packet for packet in list(self.packets) if from_s <= packet[0] < to_s]

    def silent(self, from_s: float) -> int:
        return sum(not is_voiced for at, is_voiced in self.packets if at >= from_s)

    def onsets_s(self) -> list[float]:
        """Arrival of each packet with sound that follows one without."""
        return [
            at for (_, before), (at, now) in zip(self.packets, self.packets[1:], strict=False) if now and not before
        ]


class RtpReader(threading.Thread):
    """`reader.arrivals[i]` belongs to the i-th socket. `stop()` waits for the thread."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        super().__init__(daemon=True)
        self.arrivals: list[Arrivals] = []
        self._selector = selectors.DefaultSelector()  # epoll: may be added to while it waits
        for each in sockets:
            self.add(each)
        self._is_over = False

    def add(self, source: socket.socket) -> Arrivals:
        """One more; also while the thread runs."""
        source.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        source.setblocking(False)
        self.arrivals.append(Arrivals())
        self._selector.register(source, selectors.EVENT_READ, self.arrivals[-1])
        return self.arrivals[-1]

    def run(self) -> None:
        while not self._is_over:
            for key, _ in self._selector.select(0.1):
                self._take(key.fileobj, key.data)  # type: ignore[arg-type]
        self._selector.close()

    def _take(self, source: socket.socket, arrivals: Arrivals) -> None:
        while True:
            try:
                packet, control, _, _ = source.recvmsg(2048, 64)
            except BlockingIOError:
                return
            seconds, nanoseconds = _TIMESTAMP.unpack(control[0][2])
            audio = packet[_RTP_HEADER_BYTES:]
            num_loud = len(audio.translate(None, _QUIET))  # a voiced packet has hardly any of the quietest codes
            arrivals.packets.append((seconds + nanoseconds / 1e9, num_loud > len(audio) // 2))

    def stop(self) -> None:
        self._is_over = True
        self.join()


class Clicker(threading.Thread):
    """Sends PCMU from `source` to `to` in real time, with a click of one packet every half second."""

    def __init__(self, source: socket.socket, to: tuple[str, int]) -> None:
        super().__init__(daemon=True)
        self._source, self._to = source, to
        self.sent_s: list[float] = []
        self._is_over = False

    def run(self) -> None:
        began_s, number = time.monotonic(), 0
        while not self._is_over:
            time.sleep(max(0.0, began_s + number * 0.02 - time.monotonic()))
            is_click = number % _CLICK_EVERY == _CLICK_EVERY - 1
            if is_click:
                self.sent_s.append(time.time())  # the clock of the kernel's stamps
            header = RTP_HEADER.pack(0x80, 0, number & 0xFFFF, 160 * number, 4711)
            self._source.sendto(header + (_LOUD if is_click else _SILENCE), self._to)
            number += 1

    def stop(self) -> None:
        self._is_over = True
        self.join()


def delays_ms(sent_s: Sequence[float], onsets_s: Sequence[float]) -> list[float]:
    """From each click to the first sound that came back before the next one; a click without an answer is left out."""
    found = []
    for sent in sent_s:
        answer = next((onset for onset in onsets_s if sent <= onset < sent + 0.45), None)
        if answer is not None:
            found.append(1000 * (answer - sent))
    return found


def rtp_address(answer: str) -> tuple[str, int]:
    """Where the SDP of a 200 OK wants its audio."""
    host, port = re.search(r"^c=IN IP4 (\S+)", answer, re.MULTILINE), re.search(r"^m=audio (\d+)", answer, re.MULTILINE)
    if host is None or port is None:
        raise ValueError("the answer has no audio in its SDP")
    return host.group(1), int(port.group(1))


def cpu_s(pid: int) -> float:
    """CPU time that a process has used, user and system (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
