"""May this campaign call this party, and how: numbers by prefix, trunks in order, our number as it is shown.

Closed by default: a campaign without an `[outbound]` table calls nobody, and one without prefixes no number. Which
hosts a SIP URI may have is the operator's (`telephony.outbound_hosts`), on top of this.
"""

from __future__ import annotations

import re

import msgspec

from policies.decisions import OutboundDecision

_NUMBER = re.compile(r"\+?[0-9*#]{1,32}")
_PREFIX = re.compile(r"\+?[0-9]{0,15}")
_CALLER_ID = re.compile(r"[+0-9A-Za-z._-]{0,64}")


class OutboundRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Table `[outbound]` of a campaign."""

    prefixes: tuple[str, ...] = ()  # numbers that begin so may be called, e.g. "+39"
    is_uri_allowed: bool = False  # also sip: addresses, at hosts of telephony.outbound_hosts
    trunks: tuple[str, ...] = ()  # names of telephony.trunks, best first; () = all, in their order
    caller_id: str = ""  # our number as shown; "" = the trunk's
    display_name: str = ""


def outbound_faults(rules: OutboundRules | None) -> list[str]:
    """Every reason why these rules cannot be used."""
    if rules is None:
        return []
    faults = [
        f"outbound.prefixes: {prefix!r}: must be + and digits"
        for prefix in rules.prefixes
        if not _PREFIX.fullmatch(prefix) or prefix in ("", "+")
    ]
    if not _CALLER_ID.fullmatch(rules.caller_id):
        faults.append(f"outbound.caller_id = {rules.caller_id!r}: must be a number or the user part of a SIP address")
    if not rules.prefixes and not rules.is_uri_allowed:
        faults.append("outbound: must have prefixes or is_uri_allowed, else leave the table out")
    return faults


def decide_outbound(rules: OutboundRules | None, number: str, uri: str) -> OutboundDecision:
    """Exactly one of `number` and `uri` is given."""
    if rules is None:
        return _refused("the campaign has no [outbound] table")
    if bool(number) == bool(uri):
        return _refused("exactly one of number and uri must be given")
    if uri and not rules.is_uri_allowed:
        return _refused("outbound.is_uri_allowed is false")
    if number and not _NUMBER.fullmatch(number):
        return _refused("the number must be + and digits, * or #")
    if number and not any(number.startswith(prefix) for prefix in rules.prefixes):
        return _refused(f"no prefix of outbound.prefixes ({', '.join(rules.prefixes) or 'none'}) fits {number}")
    reason = "a sip: address is allowed" if uri else f"{number} fits outbound.prefixes"
    return OutboundDecision(
        is_allowed=True, trunks=rules.trunks, caller_id=rules.caller_id, display_name=rules.display_name,
        reasons=(reason,),
    )  # fmt: skip


def _refused(reason: str) -> OutboundDecision:
    return OutboundDecision(is_allowed=False, reasons=(reason,))
