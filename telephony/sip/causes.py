"""Why a leg ended: SIP status codes and our own reasons, as one small vocabulary.

Knows nothing of pjsip. Codes: RFC 3261 §21; q.v. RFC 3398 §7.2 for what carriers mean by them.
"""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    NORMAL = "normal"  # BYE after an answered call
    CANCELLED = "cancelled"  # the caller gave up before the answer
    BUSY = "busy"
    NO_ANSWER = "no_answer"
    REJECTED = "rejected"  # any other refusal by a party
    NOT_FOUND = "not_found"
    REDIRECTED = "redirected"  # a called party answered with another address (3xx), which we do not call
    NO_COMMON_CODEC = "no_common_codec"
    OVERLOADED = "overloaded"
    TRANSFERRED = "transferred"
    NETWORK_ERROR = "network_error"
    MEDIA_TIMEOUT = "media_timeout"  # no RTP from the party for too long
    AGENT_LOST = "agent_lost"  # our agent died and none came back in time
    WORKER_LOST = "worker_lost"  # the media worker died with the call
    NOT_PLACED = "not_placed"  # an outbound call that no worker took, or that configuration does not allow
    SHUTDOWN = "shutdown"  # we were told to stop, or our parent is gone


_BY_STATUS = {
    404: Cause.NOT_FOUND, 410: Cause.NOT_FOUND, 484: Cause.NOT_FOUND, 604: Cause.NOT_FOUND,
    408: Cause.NO_ANSWER, 480: Cause.NO_ANSWER,
    486: Cause.BUSY, 600: Cause.BUSY,
    487: Cause.CANCELLED,
    415: Cause.NO_COMMON_CODEC, 488: Cause.NO_COMMON_CODEC, 606: Cause.NO_COMMON_CODEC,
    503: Cause.OVERLOADED,
    500: Cause.NETWORK_ERROR, 502: Cause.NETWORK_ERROR, 504: Cause.NETWORK_ERROR,
}  # fmt: skip


# What a call that we placed and nobody answered is filed under; whatever is not here failed.
_UNANSWERED = {
    Cause.BUSY: "busy",
    Cause.NO_ANSWER: "no_answer",
    Cause.REJECTED: "rejected", Cause.NOT_FOUND: "rejected", Cause.NO_COMMON_CODEC: "rejected",
    Cause.REDIRECTED: "rejected",
    Cause.NORMAL: "abandoned", Cause.CANCELLED: "abandoned",
}  # fmt: skip


def disposition_of_unanswered(cause: str, by: str) -> str:
    """busy | no_answer | rejected | failed | abandoned (we ended it ourselves: `by` agent)."""
    if cause in set(Cause):
        return _UNANSWERED.get(Cause(cause), "failed")
    return "abandoned" if by == "agent" else "failed"


def cause_of_status(sip_status: int) -> Cause:
    """The cause that a final SIP status stands for."""
    if sip_status < 300:
        return Cause.NORMAL
    if sip_status < 400:
        return Cause.REDIRECTED
    return _BY_STATUS.get(sip_status, Cause.REJECTED)


def cause_of_hangup(cause: str) -> Cause:
    """The cause an agent gave with `Hangup`; anything unknown is a normal ending."""
    return Cause(cause) if cause in set(Cause) else Cause.NORMAL
