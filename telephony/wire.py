"""What crosses the Unix socket between the agent and a media worker, besides the Leg contract itself.

Each message is msgpack behind a 4-byte big-endian length. `LegOpened` carries two file descriptors (SCM_RIGHTS): the
rings' memory and an eventfd the worker signals when `to_agent` has something. Sample data and play-out commands go
through the rings, signalling through here.
"""

from __future__ import annotations

import struct

import msgspec

from telephony.leg import (
    Answer,
    DtmfReceived,
    Duck,
    Flush,
    Hangup,
    Hold,
    HoldChanged,
    LegDisconnected,
    LegEvent,
    LegIncoming,
    LegState,
    LegStateChanged,
    MediaHealth,
    Pause,
    Play,
    PlayoutProgress,
    Progress,
    Refer,
    Referred,
    ReferResult,
    Reject,
    Resume,
    SendDtmf,
    StopAnswerDetection,
    Unhold,
)

MAX_MESSAGE_BYTES = 1 << 20
_LENGTH = struct.Struct(">I")
FDS_OF_LEG_OPENED = 2


class _WireMessage(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    pass


# ------------------------------------------------------------ worker -> agent


class Hello(_WireMessage, frozen=True):
    """First message of a connection."""

    sip_address: str
    sip_port: int
    max_calls: int
    worker_pid: int


class LegOpened(_WireMessage, frozen=True):
    """A leg exists, and these are its rings. `is_resumed`: it outlived another agent; `played` tells what that one
    said."""

    leg_id: str
    direction: str  # inbound | outbound
    sample_rate_hz: int
    to_agent_bytes: int
    to_worker_bytes: int
    is_resumed: bool = False
    state: LegState = LegState.NULL
    played: dict[str, int] = {}
    can_transfer: bool = True  # false: the line has nothing like REFER


class CommandRefused(_WireMessage, frozen=True):
    """A command the leg could not carry out, with the reason; for PlaceCall the only answer."""

    leg_id: str
    command: str
    reason: str


class TrunkChanged(_WireMessage, frozen=True):
    """What became of a trunk: registered | unregistered | refused (its registrar said no) | up | down (OPTIONS,
    DNS)."""

    trunk: str
    state: str
    host: str = ""
    sip_status: int = 0
    reason: str = ""


class SecurityEvent(_WireMessage, frozen=True):
    """Somebody tried something; at most one a minute for each kind and source, with the number of times.

    kind: unlisted_source | unlisted_invite | flood | rtp_source (forged RTP kept out) | third_party_bye (a BYE of no
    call) | malformed | wrong_auth (a registrar or a called host refuses our credentials) | not_served (REGISTER and
    other methods that we have no use for) | uuid_in_use (an AudioSocket for a call that has one).
    """

    kind: str
    source_address: str
    count: int = 1
    detail: str = ""  # first line of what was sent, printable and cut: the sender's claim


# ------------------------------------------------------------ agent -> worker


class PlaceCall(_WireMessage, frozen=True):
    """Outbound INVITE, to configured hosts only: to `uri`, or to `number` by way of `trunks` (names, best first; none
    = all, in the order of configuration), whose hosts are tried in turn."""

    leg_id: str
    uri: str = ""
    number: str = ""
    trunks: tuple[str, ...] = ()
    from_user: str = ""
    display_name: str = ""
    headers: dict[str, str] = {}
    detects_answer: bool = False  # say what the callee sounds like (`leg.AnswerEvidence`)


class JoinLegs(_WireMessage, frozen=True):
    """Let the parties of two legs of this worker hear each other, and the agent no longer speak to the other one: that
    leg ends for the agent (cause transferred) while its party stays. This leg is told `ReferResult` 200 "joined", and
    is left by `Hangup` with cause transferred."""

    leg_id: str
    other_leg_id: str


class Alive(_WireMessage, frozen=True):
    """The agent's event loop turns."""


ToAgent = (
    Hello
    | LegOpened
    | CommandRefused
    | LegIncoming
    | LegStateChanged
    | DtmfReceived
    | ReferResult
    | Referred
    | HoldChanged
    | MediaHealth
    | PlayoutProgress
    | LegDisconnected
    | TrunkChanged
    | SecurityEvent
)
ToWorker = (
    PlaceCall
    | JoinLegs
    | Alive
    | Answer
    | Progress
    | Reject
    | Hangup
    | Hold
    | Unhold
    | Refer
    | SendDtmf
    | StopAnswerDetection
)

_encoder = msgspec.msgpack.Encoder()
_to_agent: msgspec.msgpack.Decoder[ToAgent] = msgspec.msgpack.Decoder(ToAgent)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
ring_events = msgspec.msgpack.Decoder(LegEvent)
ring_commands = msgspec.msgpack.Decoder(Play | Flush | Duck | Pause | Resume)


def encode(message: msgspec.Struct) -> bytes:
    """Bytes of one message, without the length (as the rings take it)."""
    return _encoder.encode(message)


def frame(message: msgspec.Struct) -> bytes:
    """Bytes of one message for the socket."""
    body = encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Bytes from the socket in, message bodies out. ValueError when a length is absurd: the peer is not one of ours."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def push(self, received: bytes) -> list[bytes]:
        self._bytes += received
        bodies = []
        while len(self._bytes) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._bytes)
            if size > MAX_MESSAGE_BYTES:
                raise ValueError(f"message of {size} bytes, at most {MAX_MESSAGE_BYTES}")
            if len(self._bytes) < _LENGTH.size + size:
                break
            bodies.append(bytes(self._bytes[_LENGTH.size : _LENGTH.size + size]))
            del self._bytes[: _LENGTH.size + size]
        return bodies


def decode_to_agent(body: bytes) -> ToAgent:
    return _to_agent.decode(body)


def decode_to_worker(body: bytes) -> ToWorker:
    return _to_worker.decode(body)
