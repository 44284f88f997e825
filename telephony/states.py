"""Which command is legal in which state of a leg: one table for every kind of leg.

States are pjsip's INVITE session states (RFC 3261 §13, §15). A missing entry is a `LegError` that names command and
state. Play-out commands are legal before the answer: they wait, and nothing is played until CONFIRMED or `Progress`.
"""

from __future__ import annotations

from telephony.leg import (
    Answer,
    Duck,
    Flush,
    Hangup,
    Hold,
    LegCommand,
    LegError,
    LegState,
    Pause,
    Play,
    Progress,
    Refer,
    Reject,
    Resume,
    SendDtmf,
    StopAnswerDetection,
    Unhold,
)  # fmt: skip

_PLAYOUT: frozenset[type] = frozenset({Play, Flush, Duck, Pause, Resume})

LEGAL: dict[LegState, frozenset[type]] = {
    LegState.NULL: _PLAYOUT | {Hangup},
    LegState.CALLING: _PLAYOUT | {Hangup},
    LegState.INCOMING: _PLAYOUT | {Answer, Progress, Reject, Hangup},
    LegState.EARLY: _PLAYOUT | {Answer, Progress, Reject, Hangup},
    LegState.CONNECTING: _PLAYOUT | {Hangup},
    LegState.CONFIRMED: _PLAYOUT | {Hangup, Hold, Unhold, Refer, SendDtmf, StopAnswerDetection},
    LegState.DISCONNECTED: frozenset({Hangup}),  # no effect: both sides may hang up at once
}


def check_legal(command: LegCommand, state: LegState) -> None:
    if type(command) not in LEGAL[state]:
        raise LegError(f"{type(command).__name__} is not possible in state {state}")


def is_playout(command: LegCommand) -> bool:
    """Play-out commands act in the media callback; the others are signalling."""
    return type(command) in _PLAYOUT
