"""An inbound REFER (RFC 3515) of a trunk that may send us elsewhere: the agent goes on with the party it is sent to.

Closed by default: only a trunk with `refer_hosts`, and only to these hosts; everything else gets 603. pjsip makes the
second call and sends the NOTIFYs with its progress (sipfrag); this keeps the agent's side whole: one leg, one clock,
one recording. The first dialog may end before the second is answered, as many exchanges do; when nobody answers then,
the leg ends with that refusal. On the endpoint's thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from telephony.config import TelephonyConfig
from telephony.leg import LegDisconnected, LegEvent, LegState, LegStateChanged, Referred
from telephony.sip.causes import Cause, cause_of_status
from telephony.sip.trunk import split_uri

if TYPE_CHECKING:
    from telephony.sip.leg import SipLeg

_REFERRER_BYE_S = 5.0  # RFC 5589 §6.1: the transferor ends its dialog once it was told of success; else we do


@dataclass
class Referral:
    before: SipLeg
    after: SipLeg
    target: str
    is_before_over: bool = False
    done_at_s: float = 0.0  # when the agent's leg went over to the second dialog


def may_refer(config: TelephonyConfig, trunk_name: str, target: str) -> bool:
    """Does the trunk this call came by allow to be sent to `target`?"""
    trunk = next((trunk for trunk in config.trunks if trunk.name == trunk_name), None)
    if trunk is None or not trunk.refer_hosts or any(mark in target for mark in '<>"?\r\n '):
        return False
    try:
        _, host, port = split_uri(target)
    except ValueError:
        return False
    allowed = {entry.lower() for entry in trunk.refer_hosts}
    return target.lower().startswith("sip:") and (host in allowed or f"{host}:{port or 5060}" in allowed)


class Referrals:
    """All that are under way. `legs` and `hidden` are the endpoint's."""

    def __init__(
        self, legs: dict[str, SipLeg], hidden: dict[int, SipLeg], sink: Callable[[SipLeg, LegEvent], None]
    ) -> None:
        self._legs, self._hidden, self._sink = legs, hidden, sink
        self._running: list[Referral] = []
        self._answered: list[Referral] = []  # to be taken over from `poll`, not from within a callback

    @property
    def legs(self) -> list[SipLeg]:
        return [referral.after for referral in self._running]

    def begin(self, before: SipLeg, after: SipLeg, target: str) -> None:
        """pjsip is about to call the target on `after`."""
        after.is_waiting = True
        self._running.append(Referral(before, after, target))
        self._sink(before, Referred(leg_id=before.leg_id, target=target))

    def is_busy(self, leg: SipLeg) -> bool:
        return any(leg in (referral.before, referral.after) for referral in self._running)

    def takes(self, leg: SipLeg, event: LegEvent) -> bool:
        """True: the agent is not to hear of it."""
        referral = next((one for one in self._running if leg in (one.before, one.after)), None)
        if referral is None:
            return False
        if leg is referral.before:
            return self._of_first(referral, event)
        if isinstance(event, LegStateChanged) and event.state is LegState.CONFIRMED:
            self._answered.append(referral)
        elif isinstance(event, LegDisconnected):
            self._not_answered(referral, event)
        return True

    def poll(self, now_s: float) -> None:
        while self._answered:
            referral = self._answered.pop(0)
            referral.after.take_over(referral.before)
            self._legs[referral.before.leg_id] = referral.after
            referral.done_at_s = now_s
            self._sink(referral.after, Referred(leg_id=referral.after.leg_id, target=referral.target, sip_status=200))
        for referral in [one for one in self._running if one.done_at_s]:
            is_late = now_s - referral.done_at_s > _REFERRER_BYE_S
            if is_late and not referral.is_before_over:
                self._hidden[id(referral.before)] = referral.before
                referral.before.end(Cause.TRANSFERRED)
            if is_late or referral.is_before_over:
                self._running.remove(referral)

    def _of_first(self, referral: Referral, event: LegEvent) -> bool:
        is_over = isinstance(event, LegDisconnected) or (
            isinstance(event, LegStateChanged) and event.state is LegState.DISCONNECTED
        )
        if is_over and not referral.done_at_s and referral.before.is_ended_by_us:
            self._running.remove(referral)  # the agent has hung up: nobody is called any more
            self._hidden[id(referral.after)] = referral.after
            referral.after.end(Cause.CANCELLED)
            return False
        referral.is_before_over = referral.is_before_over or is_over
        return is_over or bool(referral.done_at_s)

    def _not_answered(self, referral: Referral, ended: LegDisconnected) -> None:
        """The call stays as it was, if the first dialog is still there."""
        self._running.remove(referral)
        leg, status = referral.before, ended.sip_status
        self._sink(leg, Referred(leg_id=leg.leg_id, target=referral.target, sip_status=status))
        if referral.is_before_over:
            self._sink(leg, LegStateChanged(leg_id=leg.leg_id, state=LegState.DISCONNECTED))
            self._sink(leg, LegDisconnected(leg_id=leg.leg_id, cause=cause_of_status(status), sip_status=status))
            leg.dispose()
