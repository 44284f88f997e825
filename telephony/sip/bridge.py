"""A transfer whose REFER was refused is carried out by us: we call the target and join the two parties' audio.

What a B2BUA does (RFC 7092 §3.1.3), only after the party said no to RFC 3515. The agent sees one thing: `ReferResult`
with 200 "bridged" when the target has answered, or the target's refusal. When the agent then leaves with cause
`transferred`, the two parties stay joined in this worker until one of them hangs up; both count against its calls.
Plain state: the endpoint is told what the legs report and acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from telephony.leg import ReferResult

if TYPE_CHECKING:
    from telephony.sip.leg import SipLeg


@dataclass
class Bridge:
    """Owned by the endpoint."""

    party: SipLeg  # who was to be transferred
    target: SipLeg
    refusal: ReferResult  # what the REFER got
    is_joined: bool = False
    is_left_by_agent: bool = False

    def other(self, leg: SipLeg) -> SipLeg:
        return self.target if leg is self.party else self.party


def call_for(refer_to: str) -> tuple[str, str]:
    """(URI, number): how to call what stood in Refer-To; a tel: number goes by the trunks."""
    if refer_to.startswith("tel:"):
        return "", refer_to.removeprefix("tel:").split(";")[0]
    return refer_to, ""
