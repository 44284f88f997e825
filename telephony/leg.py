"""CONTRACT: one leg, as commands in and events out.

A leg is one signalling relation with one party (RFC 3261 dialog plus its media). Whoever implements it, pjsua2 in a
worker process, aiortc, or the in-memory loopback, speaks exactly these messages; the agent knows nothing else about
telephony.

Every message is a frozen, tagged struct of builtins, so the same contract suite runs in-process and over a Unix socket.
Time is counted in samples of the leg's own rate, never in seconds of a clock.
This file imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Protocol

import msgspec


class LegState(StrEnum):
    """pjsip's INVITE session states, kept verbatim (pjsip_inv_state)."""

    NULL = "null"
    CALLING = "calling"
    INCOMING = "incoming"
    EARLY = "early"
    CONNECTING = "connecting"
    CONFIRMED = "confirmed"
    DISCONNECTED = "disconnected"


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    leg_id: str


# ---------------------------------------------------------------- events: leg -> agent


class LegIncoming(Message, frozen=True):
    """An INVITE arrived. Everything here is the caller's claim: never trust it, always escape it."""

    did: str  # dialled number or user part of the Request-URI
    ani: str  # user part of From; may be withheld or spoofed; an AudioSocket's UUID, as it tells no number
    display_name: str = ""
    source_address: str = ""  # "ip:port" the INVITE came from
    headers: dict[str, str] = {}
    sample_rate_hz: int = 8000
    trunk: str = ""  # name of the configured trunk it came by; "" = a source that belongs to none
    asserted_identity: str = ""  # P-Asserted-Identity of a trunk that is trusted (RFC 3325): no mere claim
    is_withheld: bool = False  # the caller asked that the number be kept private (RFC 3323)


class LegStateChanged(Message, frozen=True):
    """`state` became true; on CONFIRMED media may flow. `sample` = samples received so far."""

    state: LegState
    sample: int = 0
    codec: str = ""  # e.g. "PCMU/8000", once known


class AudioFrame(Message, frozen=True):
    """Caller audio, line echo removed: `pcm` is int16 little endian mono; `start_sample` counts from the first sample
    of the leg."""

    pcm: bytes
    sample_rate_hz: int
    start_sample: int
    voiced: bool = False  # voice activity after echo removal


class DtmfReceived(Message, frozen=True):
    """One key (RFC 4733 telephone-event): 0-9 * # A-D."""

    digit: str
    sample: int = 0


class PlayoutProgress(Message, frozen=True):
    """The wire's read counter: `played_samples` of item `item_id` have left (leg rate). Sent at least every 100 ms
    while playing."""

    item_id: str
    played_samples: int
    is_finished: bool = False  # last sample of an item whose final chunk was given has left


class Flushed(Message, frozen=True):
    """Answer to `Flush`: the exact number of samples of the item that were really played (leg rate)."""

    item_id: str
    played_samples: int


class ReferResult(Message, frozen=True):
    """Final outcome of `Refer` (RFC 3515 NOTIFY sipfrag, or the refusal itself). sip_status 0: the party took the REFER
    and left before it told the outcome."""

    sip_status: int
    reason: str = ""


class Referred(Message, frozen=True):
    """The party sends us to somebody else (an inbound REFER that its trunk allows, RFC 3515). sip_status: 0 = `target`
    is being called; 200 = the same leg goes on with it; else its refusal."""

    target: str
    sip_status: int = 0


class HoldChanged(Message, frozen=True):
    """The party put us on hold or took us back (RFC 3264 §8.4), or we did; nothing we play is heard on hold."""

    is_held: bool
    by: str = "caller"  # caller | agent


class MediaHealth(Message, frozen=True):
    """Said once, about two seconds after the answer: does audio cross both ways?

    verdict: ok | silent_in (packets, but nothing audible yet: no fault by itself) | one_way_in_missing (no packet came
    from the party) | one_way_out_missing (the party's RTCP says that none of ours arrive) | held.
    """

    verdict: str
    codec: str = ""
    packets_in: int = 0
    packets_out: int = 0
    lost_in: int = 0
    level_in: int = 0  # loudest seen, 0-255
    promised_address: str = ""  # where the party's SDP said its audio would be
    source_address: str = ""  # where it really came from


class EchoMeasured(Message, frozen=True):
    """Said once, when 6 s of our own voice were sent after the answer: how much of it comes back.

    verdict: none (nothing that could be heard) | cancelled | strong (the canceller does not get hold of it, and what is
    left is loud enough to be taken for the caller) | unclear (three times 6 s, and what is left may be the caller's
    voice, or the delay moves). The rest is of an echo only.
    """

    verdict: str
    return_loss_db: float = 0.0  # how much quieter it comes back (echo return loss, ITU-T G.168)
    delay_ms: int = 0  # as the leg hears it, its jitter buffer included
    enhancement_db: float = 0.0  # how much of it the canceller removes (ERLE, ITU-T G.168)
    left_dbov: float = 0.0  # level of what is left


class WireMetric(Message, frozen=True):
    """Timing measured from voiced energy in what crossed the socket, in samples of the leg clock.

    kind: answered (the ACK; the clock may start after it, then `sample` is negative) | caller_onset | caller_offset |
    agent_onset | agent_offset | agent_ducked | agent_unducked.
    """

    kind: str
    sample: int


class AnswerEvidence(Message, frozen=True):
    """What the callee of an outbound leg sounds like, where the leg was asked to listen for it (answer_detection.py).

    kind: utterance (it spoke, and waits) | speaking (it has spoken on for so long) | beep | special_information (ITU-T
    E.180) | ringback | busy | fax. `sample`: where that ended, or the present one of `speaking`.
    """

    kind: str
    sample: int
    num_samples: int = 0  # how long it was
    frequency_hz: int = 0  # of a tone


class LegDisconnected(Message, frozen=True):
    """The leg is gone. `cause` is from telephony/sip/causes.py; `by` is caller | agent | network."""

    cause: str
    sip_status: int = 0
    by: str = "network"


# -------------------------------------------------------------- commands: agent -> leg


class Answer(Message, frozen=True):
    """200 OK; valid in INCOMING or EARLY."""


class Progress(Message, frozen=True):
    """183 Session Progress with SDP (RFC 3261 §21.1.5): what is played is heard before the answer, as early media."""


class Reject(Message, frozen=True):
    """Final refusal, e.g. 503 with Retry-After (RFC 3261 §21.5.4)."""

    sip_status: int
    retry_after_s: int = 0


class Play(Message, frozen=True):
    """Append audio to play-out item `item_id` (items play in the order they were first named).

    `pcm` int16 mono at `sample_rate_hz`; the leg resamples. Bounded: the leg keeps at most 30 s unplayed and refuses
    more.
    """

    item_id: str
    pcm: bytes
    sample_rate_hz: int
    is_final: bool = False
    may_duck: bool = False  # the leg itself ducks this item at the caller's onset; said with the item's first chunk


class Flush(Message, frozen=True):
    """Drop what is unplayed of `item_id` ("" = everything); answered by `Flushed` for each item dropped."""

    item_id: str = ""


class Duck(Message, frozen=True):
    """Attenuate play-out by `gain_db` (negative) from the next sample on; play-out goes on."""

    gain_db: float = -18.0


class Pause(Message, frozen=True):
    """Hold play-out at the exact next sample; silence leaves instead."""


class Resume(Message, frozen=True):
    """Undo `Duck` and `Pause`; play-out goes on at the very sample where it stood."""


class Hangup(Message, frozen=True):
    """BYE in CONFIRMED, else CANCEL or a final refusal."""

    cause: str = "normal"


class Hold(Message, frozen=True):
    """Put the party on hold by re-INVITE (sendonly, RFC 3264 §8.4)."""


class Unhold(Message, frozen=True):
    """Take the party back (sendrecv)."""


class SendDtmf(Message, frozen=True):
    """Keys out. method: rfc4733 | info (SIP INFO, application/dtmf-relay) | inband (tones) | auto: RFC 4733 when the
    party negotiated it, else tones."""

    digits: str
    method: str = "auto"


class StopAnswerDetection(Message, frozen=True):
    """It is known who answered: no more `AnswerEvidence`."""


class Refer(Message, frozen=True):
    """Blind transfer (RFC 3515): `refer_to` goes out verbatim."""

    refer_to: str


LegEvent = (
    LegIncoming
    | LegStateChanged
    | AudioFrame
    | DtmfReceived
    | PlayoutProgress
    | Flushed
    | ReferResult
    | Referred
    | HoldChanged
    | MediaHealth
    | EchoMeasured
    | WireMetric
    | AnswerEvidence
    | LegDisconnected
)
LegCommand = (
    Answer
    | Progress
    | Reject
    | Play
    | Flush
    | Duck
    | Pause
    | Resume
    | Hangup
    | Hold
    | Unhold
    | Refer
    | SendDtmf
    | StopAnswerDetection
)


class LegError(Exception):
    """A command that this leg cannot carry out in its state; names the command and the state."""


class Leg(Protocol):
    """What every telephony adapter offers. `send` never blocks on the network; its effect comes back as an event."""

    leg_id: str

    async def send(self, command: LegCommand) -> None: ...

    def events(self) -> AsyncIterator[LegEvent]:
        """Events in order, ending after `LegDisconnected`."""
        ...
