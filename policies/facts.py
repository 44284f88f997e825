"""CONTRACT: what is known about a call when a policy is asked. Facts in, decisions out; no clock, no I/O."""

from __future__ import annotations

import datetime as dt

import msgspec


class CallFacts(msgspec.Struct, frozen=True, kw_only=True):
    call_id: str
    did: str  # dialled number: chooses the campaign
    ani: str = ""
    direction: str = "inbound"
    trunk: str = ""  # by which carrier or PBX it came, "" = none that is configured
    is_number_withheld: bool = False
    is_number_asserted: bool = False  # `ani` is the P-Asserted-Identity of a trusted trunk (RFC 3325): no mere claim
    can_transfer: bool = True  # false: its line cannot be given to anybody else
    headers: dict[str, str] = {}  # X-... of the INVITE: the caller's claim; a campaign reads those it names
    started_at: dt.datetime  # timezone-aware, the shell's clock
    caller_language: str = ""  # as recognised so far, BCP 47, "" = unknown
    caller_emotion: str = ""  # as recognised so far, "" = unknown
    num_turns_not_understood: int = 0
    caller_asked_for_person: bool = False


class CheckpointFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the loaded checkpoint was trained on; a style value outside of it is refused at validation."""

    name: str
    languages: tuple[str, ...]
    dialects: tuple[str, ...]
    emotions: tuple[str, ...]
    rates: tuple[str, ...]
    voices: tuple[str, ...]
