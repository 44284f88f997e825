"""The party that real peers call while they are captured: two UDP sockets on loopback that keep every byte that comes.

It answers what has to be answered for a call to go on (RFC 3261, RFC 3264), with one codec, and knows nothing else.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable

from agent.raw_sip_peer import PCMU, RawPeer
from tests.telephony.captures import Datagram

_ANSWERED_WITH = {"sendonly": "recvonly", "recvonly": "sendonly", "inactive": "inactive"}
Upstream = Callable[[bytes], bytes]
"""A request to whoever shall answer it, and what that was."""


class CalledParty:
    """`with CalledParty() as party:` let a peer call `party.address`; then `party.request("INVITE")`, `party.rtp`."""

    def __init__(self, formats: tuple[str, str] = PCMU, upstream: Upstream | None = None) -> None:
        self._peer = RawPeer("127.0.0.1:9")
        self._peer.socket.settimeout(0.2)
        self._peer.media.settimeout(0.2)
        self._formats, self._upstream = formats, upstream
        self._is_open = True
        self.messages: list[bytes] = []  # as they came, without what was sent again
        self.answers: list[bytes] = []  # of `upstream`, in the order of the requests
        self.rtp: list[Datagram] = []
        self._threads = [threading.Thread(target=self._sip), threading.Thread(target=self._media)]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._peer.port}"

    def __enter__(self) -> CalledParty:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        for thread in self._threads:
            thread.join()
        self._peer.close()

    def request(self, method: str, number: int = 0, within_s: float = 30.0) -> bytes:
        """The first request of this method, or a later one."""
        deadline_s = time.monotonic() + within_s
        while time.monotonic() < deadline_s:
            found = [message for message in self.messages if message.startswith(method.encode() + b" ")]
            if len(found) > number:
                return found[number]
            time.sleep(0.05)
        raise TimeoutError(f"no {method} came within {within_s:.0f} s")

    def listen(self, seconds: float) -> list[Datagram]:
        """RTP from now on."""
        first = len(self.rtp)
        time.sleep(seconds)
        return self.rtp[first:]

    def _sip(self) -> None:
        while self._is_open:
            try:
                message, source = self._peer.socket.recvfrom(65536)
            except TimeoutError:
                continue
            is_request = not message.startswith(b"SIP/2.0") and message.strip()
            if is_request and message not in self.messages:
                self.messages.append(message)
                self._peer.target = source
                self._answer(message)

    def _answer(self, message: bytes) -> None:
        text = message.decode()
        if self._upstream is not None:
            answer = self._upstream(message)
            self.answers.append(answer)
            self._peer.socket.sendto(answer, self._peer.target)
        elif text.startswith("INVITE"):
            numbers, attributes = self._formats
            offered = re.findall(r"^a=(sendonly|recvonly|inactive)", text, re.MULTILINE)
            attributes += f"a={_ANSWERED_WITH[offered[0]]}\r\n" if offered else ""
            self._peer.respond(text, "200 OK", self._peer.sdp((numbers, attributes)))
        elif not text.startswith("ACK"):
            self._peer.respond(text, "200 OK")

    def _media(self) -> None:
        own = self._peer.media.getsockname()[1]
        while self._is_open:
            try:
                packet, source = self._peer.media.recvfrom(65536)
            except TimeoutError:
                continue
            self.rtp.append(Datagram(time.time(), source[1], own, packet))


def exchanged_with(address: str) -> Upstream:
    """Requests go on to this SIP server, from a port of their own; its first final answer comes back."""
    host, port = address.split(":")

    def exchange(request: bytes) -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
            own.bind(("127.0.0.1", 0))
            own.settimeout(5)
            own.sendto(request, (host, int(port)))
            while (answer := own.recv(65536)).startswith(b"SIP/2.0 1"):
                pass
            return answer

    return exchange
