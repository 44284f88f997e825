"""REFER (RFC 3515): ours goes out blind and is followed to its final NOTIFY; theirs is refused
unless its trunk allows it (sip/referral.py), and Replaces (RFC 3891) always.

Plain state, told by `sip/leg.py` what pjsip reports; time is an argument.
"""

from __future__ import annotations

import re

from telephony.leg import ReferResult

INBOUND_REFER_STATUS = 603  # Decline: an inbound REFER or Replaces changes nothing about the call
_SAFE_TARGET = re.compile(
    r"^[\x21\x23-\x3b\x3d\x3f-\x7e]{1,512}$"
)  # printable, without space, quotes and angle brackets


def check_refer_to(refer_to: str) -> None:
    """ValueError unless it can stand in a Refer-To header as it is."""
    if not _SAFE_TARGET.match(refer_to) or not refer_to.startswith(("sip:", "sips:", "tel:")):
        raise ValueError("refer_to must be a sip:, sips: or tel: URI without spaces, quotes or brackets")


class OutboundRefer:
    """One blind transfer on its way."""

    def __init__(self, leg_id: str, now_s: float, timeout_s: float) -> None:
        self._leg_id = leg_id
        self._deadline_s = now_s + timeout_s
        self.is_done = False
        self._is_accepted = False  # 202, or news of progress

    def on_status(self, sip_status: int, reason: str, is_final: bool) -> ReferResult | None:
        """A NOTIFY's sipfrag, or the refusal of the REFER itself. 1xx is news of progress only."""
        if self.is_done:
            return None
        if not is_final and (sip_status < 200 or sip_status == 202):  # accepted; the outcome is still to come
            self._is_accepted = True
            return None
        self.is_done = True
        if sip_status < 200:  # the subscription ended without an outcome
            return ReferResult(leg_id=self._leg_id, sip_status=500, reason=f"ended with {sip_status} {reason}")
        return ReferResult(leg_id=self._leg_id, sip_status=sip_status, reason=reason)

    def on_party_gone(self) -> ReferResult | None:
        """BYE before the last NOTIFY, as RFC 5589 §6.1 lets the party do: gone where we sent it, or just gone."""
        if self.is_done or not self._is_accepted:
            return None
        self.is_done = True
        return ReferResult(leg_id=self._leg_id, sip_status=0, reason="the party left before the outcome was told")

    def on_time(self, now_s: float) -> ReferResult | None:
        if self.is_done or now_s < self._deadline_s:
            return None
        self.is_done = True
        return ReferResult(leg_id=self._leg_id, sip_status=408, reason="no final NOTIFY in time")
