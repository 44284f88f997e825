"""The AudioSocket calls of one worker process: connections in, legs on the loop and clock of telephony/loop_worker.py.

Who is not listed is closed without a word. A connection says its UUID first and in time, then its leg has the word;
whoever breaks the protocol loses that connection only. What is kept out becomes security events. Who cannot be taken
is hung up on, so that the exchange's dialplan goes on. Source: see protocol.py.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import socket
import time
import uuid
from collections.abc import Callable

from telephony.audiosocket.config import AudioSocketConfig
from telephony.audiosocket.leg import AudioSocketLeg
from telephony.audiosocket.protocol import Kind, Malformed, Message, MessageReader, encode
from telephony.config import TelephonyConfig
from telephony.leg import LegIncoming
from telephony.loop_worker import LoopEndpoint
from telephony.media_worker import Admission, Sink
from telephony.security_log import SecurityLog
from telephony.sip.causes import Cause
from telephony.sip.floods import SourceBuckets, TokenBucket
from telephony.wire import SecurityEvent

UUID_HEADER = "X-AudioSocket-UUID"
_MAX_WAITING = 8  # connections beyond `max_calls` that have not said their UUID
_MAX_UNSENT_FRAMES = 10  # 200 ms that an exchange has not read, in our buffer
_SEND_BUFFER_BYTES = 1 << 14  # and what the kernel keeps of it besides: about half a second at 8 kHz
_GOODBYE_S = 1.0
# A call has 50 messages a second, 100 at 10 ms: whoever sends more would take the clock from the other calls. What TCP
# has held up may come at once, as long as a silent call lasts; 3,000 messages cost 50 ms.
_MESSAGES_PER_S, _MAX_HELD_UP_S = 200, 60


class AudioSocketEndpoint(LoopEndpoint):
    """`sink` hears every leg; `admission` is asked for every UUID; `notify` is told what was kept out."""

    def __init__(
        self, config: TelephonyConfig, settings: AudioSocketConfig, sink: Sink, admission: Admission,
        notify: Callable[[SecurityEvent], None],
    ) -> None:  # fmt: skip
        super().__init__(config, settings.max_calls, sink, admission)
        self.settings = settings
        self.connections: set[Connection] = set()
        self._networks = settings.networks
        self._security = SecurityLog(notify)
        self._calls = SourceBuckets(config.source_invites_per_s, config.source_invites_per_s)

    async def listen(self) -> asyncio.Server:
        """OSError when the port is taken."""
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: Connection(self), self.settings.bind, self.settings.port)

    def is_listed(self, host: str) -> bool:
        address = ipaddress.ip_address(host.split("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self._networks)

    def note(self, kind: str, host: str, detail: str) -> None:
        self._security.note(kind, host, detail, time.monotonic())

    @property
    def messages_at_once(self) -> int:
        return round(100 * min(self.config.rtp_timeout_s or _MAX_HELD_UP_S, _MAX_HELD_UP_S))

    @property
    def has_room(self) -> bool:
        return len(self.connections) < self.max_calls + _MAX_WAITING

    def take_call(self, connection: Connection, call_uuid: uuid.UUID) -> AudioSocketLeg | None:
        """The call of this UUID rings; None: it cannot be taken."""
        if any(other.call_uuid == call_uuid for other in self.connections):
            self.note("uuid_in_use", connection.host, f"UUID {call_uuid} has a call")
            return None
        if not self._calls.take(connection.host, time.monotonic()):
            self.note("flood", connection.host, f"more than {self.config.source_invites_per_s} calls a second")
            return None
        if self._admission():
            return None
        # The UUID names the call for the exchange only: a dialplan may use it again.
        incoming = LegIncoming(
            leg_id="a" + secrets.token_hex(8), did=self.settings.did, ani=str(call_uuid),
            source_address=connection.source_address, sample_rate_hz=self.config.sample_rate_hz,
            headers={UUID_HEADER: str(call_uuid)},
        )  # fmt: skip
        leg = AudioSocketLeg(incoming, connection, self.config, self.settings, self._sink)
        self.take(leg)
        return leg

    def check_deadlines(self, now_s: float) -> None:
        super().check_deadlines(now_s)
        for connection in list(self.connections):
            connection.on_time(now_s)
        self._security.on_time(now_s)


class Connection(asyncio.Protocol):
    """One TCP connection; until its UUID is known it has no leg. Implements `leg.Wire`."""

    def __init__(self, endpoint: AudioSocketEndpoint) -> None:
        self.host = self.source_address = ""
        self.call_uuid: uuid.UUID | None = None  # while its call is up
        self._endpoint = endpoint
        self._reader = MessageReader()
        self._messages = TokenBucket(_MESSAGES_PER_S, endpoint.messages_at_once)
        self._leg: AudioSocketLeg | None = None
        self._transport: asyncio.Transport | None = None  # None: not connected yet, or hung up
        self._is_gone = asyncio.Event()
        self._goodbye: asyncio.TimerHandle | None = None
        self._owed_since_s: float | None = None  # a UUID, or the rest of a message, as far as `on_time` has seen

    # ----------------------------------------------------------------- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), transport
        self.host, port = transport.get_extra_info("peername")[:2]
        self.source_address = f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"
        if not self._endpoint.is_listed(self.host):
            self._endpoint.note("unlisted_source", self.host, "AudioSocket")
            transport.abort()
            return
        self._transport = transport
        self._endpoint.connections.add(self)
        if not self._endpoint.has_room:
            self.hang_up()
            return
        # asyncio has set TCP_NODELAY: our 20 ms are not held back for the next.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return  # hung up
        try:
            for message in self._reader.push(data):
                if not self._messages.take(time.monotonic()):
                    raise Malformed(f"more than {_MESSAGES_PER_S} messages a second")
                self._owed_since_s = None
                self._on_message(message)
                if self._transport is None:
                    return
        except Malformed as error:
            self._endpoint.note("malformed", self.host, f"AudioSocket: {error}")
            self._drop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = self.call_uuid = None
        self._endpoint.connections.discard(self)
        self._is_gone.set()
        if self._goodbye is not None:
            self._goodbye.cancel()
        if self._leg is not None:
            self._leg.on_gone()

    def _on_message(self, message: Message) -> None:
        if self._leg is not None and message.kind is not Kind.UUID:
            if message.kind is not Kind.UNKNOWN:
                self._leg.on_message(message)
        elif self._leg is None and message.kind is Kind.UUID:
            call_uuid = uuid.UUID(bytes=message.payload)
            if not call_uuid.int:
                raise Malformed("the nil UUID")  # RFC 9562 §5.9: it names nothing
            self._leg = self._endpoint.take_call(self, call_uuid)
            if self._leg is None:
                self.hang_up()
            else:
                self.call_uuid = call_uuid
        elif message.kind in (Kind.HANGUP, Kind.ERROR):
            self.hang_up()
        else:
            raise Malformed(f"{message.kind.name} where {'no' if self._leg else 'a'} UUID belongs")

    def on_time(self, now_s: float) -> None:
        """A UUID that is not said, a message that does not end."""
        if self._leg is not None and not self._reader.is_halfway:
            return
        self._owed_since_s = now_s if self._owed_since_s is None else self._owed_since_s
        if now_s - self._owed_since_s < self._endpoint.settings.uuid_timeout_s:
            return
        if self._reader.is_halfway:  # whoever says nothing at all looks whether we are there
            self._endpoint.note("malformed", self.host, "AudioSocket: half a message, then silence")
        self._drop()

    def _drop(self) -> None:
        """It is no exchange, or not a whole one: its leg ends as one whose network failed."""
        if self._leg is not None:
            self._leg.end(Cause.NETWORK_ERROR)
        self.hang_up()

    # ---------------------------------------------------------------------------- leg.Wire

    def has_room(self, num_bytes: int) -> bool:
        transport = self._transport
        return transport is not None and transport.get_write_buffer_size() <= _MAX_UNSENT_FRAMES * num_bytes

    def send_audio(self, message: bytes) -> bool:
        """In one write: an Asterisk from before March 2026 cannot read half a header."""
        if self._transport is None or not self.has_room(len(message)):
            return False
        self._transport.write(message)
        return True

    def hang_up(self) -> None:
        """After what was said before; an exchange that does not read is left all the same."""
        transport, self._transport, self.call_uuid = self._transport, None, None
        if transport is not None:
            transport.write(encode(Kind.HANGUP))
            transport.close()
            self._goodbye = asyncio.get_running_loop().call_later(_GOODBYE_S, transport.abort)

    async def closed(self) -> None:
        await self._is_gone.wait()
