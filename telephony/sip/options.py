"""Is somebody there who would take a call? An OPTIONS outside of any dialog, and whatever final answer it gets.

RFC 3261 §11: the answer is the one an INVITE would have had, so 200 says more than an open port: the worker's loop
turns and its SIP stack reads and answers. Over UDP it is sent again by §17.1.2.2 (timer E). Knows no pjsip: it speaks
to our own workers as any peer would.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets

_T1_S, _T2_S = 0.5, 4.0  # RFC 3261 §17.1.1.1
_STATUS_LINE = re.compile(rb"SIP/2\.0 ([2-6]\d\d) ")


async def ask_options(address: str, port: int, transport: str = "udp") -> int:
    """The final status. OSError when nobody listens; does not return without an answer: the caller bounds it."""
    if transport == "tcp":
        return await _ask_tcp(address, port)
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[int] = loop.create_future()
    endpoint, _ = await loop.create_datagram_endpoint(lambda: _Client(answered), remote_addr=(address, port))
    try:
        host, own_port, *_ = endpoint.get_extra_info("sockname")
        request = _options(address, port, "UDP", host, own_port)
        wait_s = _T1_S
        while True:
            endpoint.sendto(request)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    return await asyncio.shield(answered)
            wait_s = min(2 * wait_s, _T2_S)
    finally:
        answered.cancel()
        endpoint.close()


async def _ask_tcp(address: str, port: int) -> int:
    reader, writer = await asyncio.open_connection(address, port)
    try:
        host, own_port, *_ = writer.get_extra_info("sockname")
        writer.write(_options(address, port, "TCP", host, own_port))
        while True:
            if not (line := await reader.readline()):
                raise ConnectionError("the connection was closed without an answer")
            if match := _STATUS_LINE.match(line):
                return int(match[1])
    finally:
        writer.close()


class _Client(asyncio.DatagramProtocol):
    def __init__(self, answered: asyncio.Future[int]) -> None:
        self._answered = answered

    def datagram_received(self, data: bytes, _address: object) -> None:
        if (match := _STATUS_LINE.match(data)) and not self._answered.done():
            self._answered.set_result(int(match[1]))

    def error_received(self, error: Exception) -> None:
        """Port unreachable (ICMP): nobody listens."""
        if not self._answered.done():
            self._answered.set_exception(error)


def _options(address: str, port: int, transport: str, own_host: str, own_port: int) -> bytes:
    host, own = (f"[{it}]" if ":" in it else it for it in (address, own_host))
    tag, call_id, branch = secrets.token_hex(4), secrets.token_hex(8), f"z9hG4bK{secrets.token_hex(8)}"
    lines = (
        f"OPTIONS sip:{host}:{port};transport={transport.lower()} SIP/2.0",
        f"Via: SIP/2.0/{transport} {own}:{own_port};branch={branch};rport",
        "Max-Forwards: 70",
        f"From: <sip:heartbeat@{own}>;tag={tag}",
        f"To: <sip:{host}:{port}>",
        f"Call-ID: {call_id}",
        "CSeq: 1 OPTIONS",
        f"Contact: <sip:heartbeat@{own}:{own_port};transport={transport.lower()}>",
        "Accept: application/sdp",
        "Content-Length: 0",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
