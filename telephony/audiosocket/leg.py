"""One AudioSocket as a leg: its messages become LegEvents, LegCommands become messages (walk: hops 1 and 13).

The UUID is the INVITE, our first audio the 200 OK, HANGUP or the end of the connection the BYE. What the exchange sends
is converted to the leg's rate and put on its clock, ours leaves every 20 ms at the rate that the exchange sends at. TCP
may hold either up: what waits is bounded both ways, and the oldest of theirs, the newest of ours is dropped. Runs on
the worker's loop; knows no socket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from telephony.audiosocket.config import AudioSocketConfig
from telephony.audiosocket.protocol import FRAME_MS, RATE_HZ_OF, Kind, Message, encode
from telephony.caller_timeline import CallerTimeline
from telephony.config import TelephonyConfig
from telephony.inbound_leg import InboundLeg
from telephony.leg import DtmfReceived, LegEvent, LegIncoming, LegState
from telephony.resample import StreamResampler
from telephony.sip.causes import Cause
from telephony.sip.media_health import MediaCounts, health_of, level_of

KEYS = frozenset("0123456789*#ABCD")
_STUCK_S = 5.0  # an exchange that reads nothing for so long is gone


class Wire(Protocol):
    """The connection, as its leg needs it."""

    def has_room(self, num_bytes: int) -> bool:
        """Whether a message of this size would be sent; False: the exchange does not read."""

    def send_audio(self, message: bytes) -> bool:
        """False: dropped, there was no room."""

    def hang_up(self) -> None: ...

    async def closed(self) -> None: ...


class AudioSocketLeg(InboundLeg):
    """One call. `sink` hears its events."""

    origin = "by AudioSocket"

    def __init__(
        self, incoming: LegIncoming, wire: Wire, config: TelephonyConfig, settings: AudioSocketConfig,
        sink: Callable[[Any, LegEvent], None],
    ) -> None:  # fmt: skip
        super().__init__(incoming, config, sink, config.rtp_timeout_s)
        self._wire = wire
        self._timeline = CallerTimeline(config.sample_rate_hz, config.samples_per_frame, settings.jitter_ms)
        self._num_samples = 0  # received so far, at the leg's rate
        self._kind, self._is_kind_known = Kind.SLIN, False  # every exchange takes that
        self._rates = _Rates(config.sample_rate_hz, RATE_HZ_OF[Kind.SLIN])
        self._codec = "slin/8000"
        self._counts = MediaCounts()
        self._is_health_told = False
        self._num_unsent = 0  # frames in a row

    # -------------------------------------------------------------- from the exchange

    def on_message(self, message: Message) -> None:
        """Anything but UUID and UNKNOWN."""
        match message.kind:
            case Kind.HANGUP:
                self.on_gone()
            case Kind.ERROR:
                self.end(Cause.NETWORK_ERROR)
            case Kind.DTMF:
                # Asterisk also sends what is no key, such as "f" for a fax tone.
                digit = message.payload.decode("ascii", "replace")
                if digit in KEYS and self.state is LegState.CONFIRMED:
                    self._sink(self, DtmfReceived(leg_id=self.leg_id, digit=digit, sample=self.media.sample))
            case kind:
                self._on_audio(kind, message.payload)

    def on_gone(self) -> None:
        """The exchange has hung up."""
        if self.state in (LegState.CONNECTING, LegState.CONFIRMED):
            self._finish(Cause.NORMAL, 200, "caller")
        else:
            self._finish(Cause.CANCELLED, 487, "caller")

    def _on_audio(self, kind: Kind, pcm: bytes) -> None:
        self._is_kind_known = True
        if kind is not self._kind:
            self._kind, self._rates = kind, _Rates(self._config.sample_rate_hz, RATE_HZ_OF[kind])
            self._codec = f"slin/{RATE_HZ_OF[kind]}"
        if self.state is LegState.CONNECTING:
            self._confirm()
        if self.state is not LegState.CONFIRMED:
            return  # the leg's clock does not run yet
        self._num_received += 1
        self._counts.packets_in += 1
        self._counts.level_in = max(self._counts.level_in, level_of(pcm))
        samples = np.frombuffer(self._rates.to_leg.push(pcm), "<i2")
        self._timeline.push(self._num_samples, samples)
        self._num_samples += len(samples)

    # ------------------------------------------------------------------ to the exchange

    def tick(self) -> None:
        """20 ms of the leg's clock, while CONFIRMED."""
        self.media.is_held = not self._wire.has_room(self._rates.frame_bytes)  # what nobody reads was not heard
        for frame in self._rates.to_wire(self.media.request()):
            self._send(frame)
        self.media.receive(self._timeline.pull())

    def _send(self, frame: bytes) -> None:
        if self._wire.send_audio(encode(self._kind, frame)):
            self._counts.packets_out += 1
            self._num_unsent = 0
            return
        self._num_unsent += 1
        if self._num_unsent * FRAME_MS > 1000 * _STUCK_S:
            self.end(Cause.NETWORK_ERROR)

    def on_time(self, now_s: float) -> None:
        """An exchange that sends nothing is spoken to all the same; the media's health is judged after its time."""
        super().on_time(now_s)
        if self.state is LegState.CONNECTING:
            self._confirm()
        if self.state is not LegState.CONFIRMED or self._is_health_told or self._since_s is None:
            return
        if now_s - self._since_s >= self._config.health_after_s:
            self._is_health_told = True
            source = self.incoming.source_address
            self._sink(self, health_of(
                self.leg_id, self._counts, codec=self._codec, is_held=False, promised_address=source,
                source_address=source,
            ))  # fmt: skip

    def _answer(self) -> None:
        """Its first audio says at which rate it is answered, and comes within 20 ms of the UUID as a rule."""
        if self._is_kind_known:
            self._confirm()

    def _let_go(self) -> None:
        self._wire.hang_up()

    async def closed(self) -> None:
        await self._wire.closed()


class _Rates:
    """Between the leg's rate and that of the exchange, both ways."""

    def __init__(self, leg_hz: int, wire_hz: int) -> None:
        self.to_leg = StreamResampler(wire_hz, leg_hz)
        self._from_leg = StreamResampler(leg_hz, wire_hz)
        self.frame_bytes = 2 * wire_hz * FRAME_MS // 1000
        # A resampler withholds up to 2 ms: silence in their place, or every frame would leave a tick later.
        self._waiting = bytearray(self.frame_bytes // 10 // 2 * 2 if leg_hz != wire_hz else 0)

    def to_wire(self, pcm: bytes) -> list[bytes]:
        """Whole frames of 20 ms: one a tick."""
        self._waiting += self._from_leg.push(pcm)
        frames = []
        while len(self._waiting) >= self.frame_bytes:
            frames.append(bytes(self._waiting[: self.frame_bytes]))
            del self._waiting[: self.frame_bytes]
        return frames
