"""One browser's call as a leg: aiortc's connection becomes LegEvents, LegCommands become WebRTC (RFC 8829, RFC 8835).

The same states and events as a SIP dialog, so the agent cannot tell the difference: the offer is the INVITE, our answer
the 200 OK, ICE and DTLS done is the ACK, the end of the connection is the BYE. Keys and the hang-up come over a data
channel named `control` (aiortc carries no telephone-event): {"digit": "5"} and {"hangup": true}. All on one event loop.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from typing import Any

import msgspec
from aiortc import RTCConfiguration, RTCIceServer, RTCPeerConnection, RTCSessionDescription
from aiortc.exceptions import InvalidAccessError, InvalidStateError, OperationError
from aiortc.mediastreams import MediaStreamTrack
from aiortc.rtcdatachannel import RTCDataChannel

from telephony.caller_timeline import CallerTimeline
from telephony.config import TelephonyConfig
from telephony.inbound_leg import InboundLeg
from telephony.leg import (
    DtmfReceived,
    LegEvent,
    LegIncoming,
    LegState,
)  # fmt: skip
from telephony.sip.causes import Cause
from telephony.webrtc.config import WebRtcConfig
from telephony.webrtc.ice import with_public_address
from telephony.webrtc.jitter import Promptly
from telephony.webrtc.signaling import Answered, Refused, Reply
from telephony.webrtc.tracks import AgentTrack, read_caller

DIGITS = frozenset("0123456789*#ABCD")
_MAX_CONTROL_BYTES = 200
_MAX_CONTROLS = 500  # of one call: nobody presses more keys
_MEDIA_LINE = re.compile(r"^m=(\w+) ", re.MULTILINE)
_CODEC = re.compile(r"^a=rtpmap:\d+ ([\w-]+)/(\d+)", re.MULTILINE)
_OFFER_FAULTS = (ValueError, KeyError, IndexError, AttributeError, InvalidAccessError, InvalidStateError)
_NOT_ACCEPTABLE_HERE = 488


class _Control(msgspec.Struct):
    digit: str = ""
    hangup: bool = False


_controls = msgspec.json.Decoder(_Control)


class WebRtcLeg(InboundLeg):
    """One call. `sink` hears its events; `reply` is the future that the page's server waits for."""

    origin = "from a browser"

    def __init__(
        self, incoming: LegIncoming, offer_sdp: str, config: TelephonyConfig, settings: WebRtcConfig,
        sink: Callable[[WebRtcLeg, LegEvent], None], servers: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        super().__init__(incoming, config, sink, settings.media_timeout_s)
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.reply.add_done_callback(self._on_reply_done)
        self._offer_sdp, self._settings, self._servers = offer_sdp, settings, servers
        self._connection: RTCPeerConnection | None = None
        self._voice = AgentTrack(config.sample_rate_hz)
        self._timeline = CallerTimeline(config.sample_rate_hz, config.samples_per_frame, settings.jitter_ms)
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_controls = 0

    # ----------------------------------------------------------------- commands

    def refuse(self, sip_status: int, retry_after_s: int, cause: Cause) -> None:
        reason = "all lines are busy" if sip_status == 503 else f"refused: {cause}"
        self._settle(Refused(status=sip_status, reason=reason, retry_after_s=retry_after_s))
        super().refuse(sip_status, retry_after_s, cause)

    def end(self, cause: Cause) -> None:
        self._settle(Refused(status=503, reason=f"the call ended: {cause}"))
        super().end(cause)

    def on_time(self, now_s: float) -> None:
        """The connection has a deadline too."""
        super().on_time(now_s)
        waited_s = now_s - (now_s if self._since_s is None else self._since_s)
        if self.state is LegState.CONNECTING and waited_s > self._settings.connect_timeout_s:
            self.end(Cause.NETWORK_ERROR)

    def tick(self) -> None:
        """20 ms of the leg's clock, while CONFIRMED."""
        self._voice.push(self.media.request())
        self.media.receive(self._timeline.pull())

    async def closed(self) -> None:
        """Everything of it has ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------- the connection

    def _answer(self) -> None:
        self._spawn("answer", self._accept())

    async def _accept(self) -> None:
        """Our answer, complete with candidates: browsers need no trickle then."""
        try:
            kinds = _MEDIA_LINE.findall(self._offer_sdp)
            if sorted(kinds) not in (["audio"], ["application", "audio"]):
                raise OperationError(f"one audio and at most one data section, not {kinds}")
            connection = self._connect()
            await connection.setRemoteDescription(RTCSessionDescription(self._offer_sdp, "offer"))
            connection.addTrack(self._voice)
            await connection.setLocalDescription(await connection.createAnswer())
            sdp = connection.localDescription.sdp
        except OperationError as error:
            self._fail(_NOT_ACCEPTABLE_HERE, str(error), Cause.NO_COMMON_CODEC)
            return
        except _OFFER_FAULTS as error:
            self._fail(400, f"not a usable offer: {type(error).__name__}", Cause.REJECTED)
            return
        if self.state is LegState.DISCONNECTED:
            return
        codec = _CODEC.search(sdp)
        self._codec = f"{codec[1]}/{codec[2]}" if codec else ""
        self._settle(Answered(leg_id=self.leg_id, sdp=with_public_address(sdp, self._settings.public_address)))

    def _connect(self) -> RTCPeerConnection:
        servers = [RTCIceServer(**server) for server in self._servers]
        connection = self._connection = RTCPeerConnection(RTCConfiguration(iceServers=servers))
        connection.on("connectionstatechange", self._on_connection_state)
        connection.on("track", self._on_track)
        connection.on("datachannel", self._on_data_channel)
        return connection

    def _on_connection_state(self) -> None:
        assert self._connection is not None
        match self._connection.connectionState:
            case "connected" if self.state is LegState.CONNECTING:
                self._confirm()
            case "failed":
                self.end(Cause.NETWORK_ERROR)
            case "closed" if self.state in (LegState.CONNECTING, LegState.CONFIRMED):
                self._finish(Cause.NORMAL, 200, "caller")

    def _on_track(self, track: MediaStreamTrack) -> None:
        if track.kind != "audio":
            return
        assert self._connection is not None
        for receiver in self._connection.getReceivers():
            if receiver.track is track:
                # The one place that reaches into aiortc: its own buffer cannot be configured (see jitter.py).
                receiver._RTCRtpReceiver__jitter_buffer = self._promptly = Promptly()  # type: ignore[attr-defined]
        self._spawn("caller", self._read(track))

    async def _read(self, track: MediaStreamTrack) -> None:
        def push(start: int, pcm: Any) -> None:
            self._num_received += 1
            self._timeline.push(start, pcm)

        await read_caller(track, push, self._config.sample_rate_hz)

    def _on_data_channel(self, channel: RTCDataChannel) -> None:
        if channel.label == "control":
            channel.on("message", self._on_control)

    def _on_control(self, message: str | bytes) -> None:
        self._num_controls += 1
        if self.state is not LegState.CONFIRMED or len(message) > _MAX_CONTROL_BYTES:
            return
        if self._num_controls > _MAX_CONTROLS:
            return
        try:
            control = _controls.decode(message)
        except msgspec.DecodeError:
            return
        if control.digit in DIGITS:
            self._sink(self, DtmfReceived(leg_id=self.leg_id, digit=control.digit, sample=self.media.sample))
        if control.hangup:
            self._finish(Cause.NORMAL, 200, "caller")

    # ------------------------------------------------------------------ private

    def _fail(self, status: int, reason: str, cause: Cause) -> None:
        self._settle(Refused(status=status, reason=reason))
        self._finish(cause, status, "caller")

    def _settle(self, reply: Reply) -> None:
        if not self.reply.done():
            self.reply.set_result(reply)

    def _on_reply_done(self, reply: asyncio.Future[Reply]) -> None:
        if reply.cancelled():  # the page went away before the answer
            self._finish(Cause.CANCELLED, 487, "caller")

    def _let_go(self) -> None:
        self._voice.stop()
        if self._connection is not None:
            self._spawn("close", self._connection.close())

    def _spawn(self, name: str, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"leg-{self.leg_id}/{name}")
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            print(f"webrtc: {task.get_name()}: {type(error).__name__}: {error}", file=sys.stderr)
            self.end(Cause.NETWORK_ERROR)
