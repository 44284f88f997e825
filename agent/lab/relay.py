"""A SIP and RTP relay between a caller and an agent that gives every packet the fate of a `LineProfile`.

The caller dials the relay; the INVITE goes on to the agent with the relay's own RTP ports in its SDP (RFC 4566), and so
does the answer on the way back. Only the INVITE transaction passes here: ACK, BYE and REFER go from Contact to Contact
(RFC 3261 §12.2), so the signalling is that of a good network while every RTP packet of both directions is ours to
lose, delay, swap, double, and to mix echo and noise into. RTCP passes untouched. Both directions are recorded before
the damage, where each party put them on the wire: timings are those of the agent, not of the line.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
from collections.abc import Callable
from typing import cast

import numpy as np

from agent.lab import rtp
from agent.lab.line import NO_NOISE_DBOV, LineProfile, LossyDirection

Address = tuple[str, int]
_MEDIA_LINE = re.compile(rb"^m=audio (\d+) ", re.MULTILINE)
_CONNECTION = re.compile(rb"^c=IN IP4 (\S+)", re.MULTILINE)
_RTCP_LINE = re.compile(rb"^a=rtcp:\d+[^\r\n]*\r\n", re.MULTILINE)
_LENGTH = re.compile(rb"^(Content-Length|l):\s*\d+", re.MULTILINE | re.IGNORECASE)
_CALL_ID = re.compile(rb"^(?:Call-ID|i):\s*(\S+)", re.MULTILINE | re.IGNORECASE)
_ECHO_TAPS = 40  # 5 ms of dispersion


class _Port(asyncio.DatagramProtocol):
    def __init__(self, on_packet: Callable[[bytes, Address], None]) -> None:
        self._on_packet = on_packet
        self.transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)  # asyncio's own is no subclass of it in 3.11

    def datagram_received(self, data: bytes, addr: Address) -> None:
        self._on_packet(data, addr)

    def error_received(self, exc: Exception) -> None:
        pass  # a port that closed at the other end: that party has hung up

    def send(self, packet: bytes, to: Address | None) -> None:
        if to is not None and self.transport is not None and not self.transport.is_closing():
            self.transport.sendto(packet, to)


class EchoPath:
    """The caller's end of the line: what we sent comes back later, quieter, slightly smeared; and noise."""

    def __init__(self, profile: LineProfile, seed: int) -> None:
        rng = np.random.default_rng(seed)
        taps = 0.3 * rng.standard_normal(_ECHO_TAPS) * np.exp(-np.arange(_ECHO_TAPS) / 10)
        taps[0] = 1.0
        gain = 10 ** (-profile.echo_return_loss_db / 20) if profile.has_echo else 0.0
        self._taps = gain * taps / np.sqrt(np.sum(taps**2))
        self._noise = 0.0 if profile.noise_dbov <= NO_NOISE_DBOV else 32768 * 10 ** (profile.noise_dbov / 20)
        self._rng = rng
        self._sent = np.zeros(round(profile.echo_delay_ms * rtp.RATE_HZ / 1000) + _ECHO_TAPS - 1)
        self._waiting = np.zeros(0)
        self.is_needed = profile.has_echo or self._noise > 0

    def sent(self, samples: np.ndarray) -> None:
        """What the agent put on the line, packet by packet."""
        whole = np.concatenate([self._sent, samples.astype(float)])
        echo = np.convolve(whole, self._taps, "full")[_ECHO_TAPS - 1 : _ECHO_TAPS - 1 + len(samples)]
        self._sent = whole[len(samples) :]
        self._waiting = np.concatenate([self._waiting, echo])[-rtp.RATE_HZ :]

    def received(self, samples: np.ndarray) -> np.ndarray:
        """The caller's packet with the echo that has come round by now, and the noise around the caller."""
        size = len(samples)
        echo, self._waiting = self._waiting[:size], self._waiting[size:]
        mixed = samples.astype(float)
        mixed[: len(echo)] += echo
        if self._noise:
            mixed += np.convolve(self._rng.standard_normal(size + 3), np.ones(4) / 2, "valid") * self._noise
        return mixed


class RelayedCall:
    """The media of one call: two RTP ports (and their RTCP neighbours), one direction each way."""

    def __init__(self, profile: LineProfile, seed: int) -> None:
        rng = random.Random(seed)
        self.to_agent, self.to_caller = (LossyDirection(profile, rng.randrange(2**31)) for _ in range(2))
        self.from_caller, self.from_agent = rtp.RtpTrack(), rtp.RtpTrack()
        self._echo = EchoPath(profile, rng.randrange(2**31))
        self._caller: list[Address | None] = [None, None]  # [RTP, RTCP], as the SDP says until a packet shows better
        self._agent: list[Address | None] = [None, None]
        self._caller_ports: list[_Port] = []
        self._agent_ports: list[_Port] = []

    @property
    def is_open(self) -> bool:
        return bool(self._agent_ports)

    async def open(self, host: str) -> None:
        """Even RTP ports with the odd neighbour for RTCP (RFC 3550 §11)."""
        self._caller_ports = await _port_pair(host, (self._rtp_of_caller, self._rtcp_of_caller))
        self._agent_ports = await _port_pair(host, (self._rtp_of_agent, self._rtcp_of_agent))

    def sdp_to_agent(self, message: bytes, host: str) -> bytes:
        self._caller = _addresses(message, self._caller)
        return _with_media(message, host, _number(self._agent_ports[0]))

    def sdp_to_caller(self, message: bytes, host: str) -> bytes:
        self._agent = _addresses(message, self._agent)
        return _with_media(message, host, _number(self._caller_ports[0]))

    def close(self) -> None:
        for port in (*self._caller_ports, *self._agent_ports):
            if port.transport is not None:
                port.transport.close()

    # ------------------------------------------------------------------ packets

    def _rtp_of_caller(self, data: bytes, addr: Address) -> None:
        self._caller[0] = addr
        loop = asyncio.get_running_loop()
        packet = rtp.parse(data)
        if packet is not None:
            self.from_caller.add(packet, loop.time())
            samples = rtp.decode(packet) if self._echo.is_needed else None
            if samples is not None:
                data = rtp.with_payload(data, rtp.encode(packet.payload_type, self._echo.received(samples)))
        for due_s in self.to_agent.pass_on(loop.time()):
            loop.call_at(due_s, self._send_to_agent, data)

    def _rtp_of_agent(self, data: bytes, addr: Address) -> None:
        self._agent[0] = addr
        loop = asyncio.get_running_loop()
        packet = rtp.parse(data)
        if packet is not None:
            self.from_agent.add(packet, loop.time())
            samples = rtp.decode(packet) if self._echo.is_needed else None
            if samples is not None:
                self._echo.sent(samples)
        for due_s in self.to_caller.pass_on(loop.time()):
            loop.call_at(due_s, self._send_to_caller, data)

    def _send_to_agent(self, data: bytes) -> None:
        self._agent_ports[0].send(data, self._agent[0])

    def _send_to_caller(self, data: bytes) -> None:
        self._caller_ports[0].send(data, self._caller[0])

    def _rtcp_of_caller(self, data: bytes, addr: Address) -> None:
        self._caller[1] = addr
        self._agent_ports[1].send(data, self._agent[1])

    def _rtcp_of_agent(self, data: bytes, addr: Address) -> None:
        self._agent[1] = addr
        self._caller_ports[1].send(data, self._caller[1])


class Relay:
    """`async with Relay(target, profile, seed) as relay:` then dial `sip:100@{relay.address}`; see `relay.calls`."""

    def __init__(self, target: str, profile: LineProfile, seed: int = 1) -> None:
        host, port = target.rsplit(":", 1)
        self._agent: Address = (socket.gethostbyname(host), int(port))
        self._profile, self._seed = profile, seed
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(self._agent)  # sends nothing; tells which of our addresses leads there
            self.host: str = probe.getsockname()[0]
        self.calls: dict[bytes, RelayedCall] = {}
        self._caller: dict[bytes, Address] = {}
        self._sip: list[_Port] = []
        self._opening: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Relay:
        self._sip = [await _port(self.host, on_packet) for on_packet in (self._from_caller, self._from_agent)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for call in self.calls.values():
            call.close()
        for port in self._sip:
            if port.transport is not None:
                port.transport.close()
        await asyncio.sleep(0)  # the transports' last callbacks

    @property
    def address(self) -> str:
        return f"{self.host}:{_number(self._sip[0])}"

    def _from_caller(self, message: bytes, addr: Address) -> None:
        call_id = _call_id(message)
        self._caller[call_id] = addr
        if call_id in self.calls or not message.startswith(b"INVITE"):
            self._forward_to_agent(call_id, message)
            return
        self.calls[call_id] = RelayedCall(self._profile, self._seed + len(self.calls))
        task = asyncio.get_running_loop().create_task(self._open(call_id, message), name="relay/open")
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, call_id: bytes, invite: bytes) -> None:
        await self.calls[call_id].open(self.host)
        self._forward_to_agent(call_id, invite)

    def _forward_to_agent(self, call_id: bytes, message: bytes) -> None:
        call = self.calls.get(call_id)
        if call is not None and not call.is_open:
            return  # a retransmission; the first one is about to go out
        if call is not None and _MEDIA_LINE.search(message):
            message = call.sdp_to_agent(message, self.host)
        self._sip[1].send(message, self._agent)

    def _from_agent(self, message: bytes, _addr: Address) -> None:
        call_id = _call_id(message)
        call = self.calls.get(call_id)
        if call is not None and _MEDIA_LINE.search(message):
            message = call.sdp_to_caller(message, self.host)
        self._sip[0].send(message, self._caller.get(call_id))


async def _port(host: str, on_packet: Callable[[bytes, Address], None], number: int = 0) -> _Port:
    loop = asyncio.get_running_loop()
    _, port = await loop.create_datagram_endpoint(lambda: _Port(on_packet), local_addr=(host, number))
    return port


async def _port_pair(host: str, handlers: tuple[Callable[[bytes, Address], None], ...]) -> list[_Port]:
    for _ in range(50):
        first = await _port(host, handlers[0])
        if _number(first) % 2 == 0:
            try:
                return [first, await _port(host, handlers[1], _number(first) + 1)]
            except OSError:
                pass
        assert first.transport is not None
        first.transport.close()
    raise OSError(f"no free pair of UDP ports on {host}")


def _number(port: _Port) -> int:
    assert port.transport is not None
    return int(port.transport.get_extra_info("sockname")[1])


def _call_id(message: bytes) -> bytes:
    found = _CALL_ID.search(message)
    return found.group(1) if found else b""


def _addresses(message: bytes, known: list[Address | None]) -> list[Address | None]:
    """Where the SDP says that RTP and RTCP go."""
    media, connection = _MEDIA_LINE.search(message), _CONNECTION.search(message)
    if media is None or connection is None:
        return known
    host, port = connection.group(1).decode(), int(media.group(1))
    return [(host, port), (host, port + 1)]


def _with_media(message: bytes, host: str, port: int) -> bytes:
    """The SDP with our address and port; the length header follows the new body."""
    head, _, body = message.partition(b"\r\n\r\n")
    body = _MEDIA_LINE.sub(b"m=audio %d " % port, body, count=1)
    body = _RTCP_LINE.sub(b"", _CONNECTION.sub(b"c=IN IP4 " + host.encode(), body))
    return _LENGTH.sub(b"Content-Length: %d" % len(body), head) + b"\r\n\r\n" + body
