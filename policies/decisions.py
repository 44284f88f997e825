"""CONTRACT: what policies decide. Frozen and serialisable; every decision carries its reasons and is stored."""

from __future__ import annotations

import msgspec


class StyleDecision(msgspec.Struct, frozen=True, kw_only=True):
    """How the agent speaks in this call; `instruction` is the sentence given to the model."""

    language: str
    dialect: str
    emotion: str
    rate: str
    instruction: str
    reasons: tuple[str, ...]


class DuplexDecision(msgspec.Struct, frozen=True, kw_only=True):
    """How the floor is taken and yielded in this call: `values` go over the operator's [turn_taking]."""

    preset: str
    values: dict[str, float]
    reasons: tuple[str, ...]


class AdmissionDecision(msgspec.Struct, frozen=True, kw_only=True):
    is_admitted: bool
    sip_status: int = 200
    retry_after_s: int = 0
    reasons: tuple[str, ...] = ()


class OutboundDecision(msgspec.Struct, frozen=True, kw_only=True):
    """May this campaign call this party; by which trunks and as whom."""

    is_allowed: bool
    trunks: tuple[str, ...] = ()
    caller_id: str = ""
    display_name: str = ""
    reasons: tuple[str, ...] = ()


class AnswerDecision(msgspec.Struct, frozen=True, kw_only=True):
    """No person has answered our call. action: hang_up | leave_message | answer | go_on."""

    action: str
    reasons: tuple[str, ...] = ()


class EscalationDecision(msgspec.Struct, frozen=True, kw_only=True):
    """action: none | offer_keypad | transfer | callback_request."""

    action: str
    refer_to: str = ""
    is_warm: bool = False  # the person is called and told first, then connected
    reasons: tuple[str, ...] = ()
