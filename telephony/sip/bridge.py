"""Two parties joined in this worker: a transfer whose REFER was refused, or a person the agent has called (hand-off).

What a B2BUA does (RFC 7092 §3.1.3). Two ways in:

* the party said no to our REFER (RFC 3515) and `bridges_refused_transfers` is set: we call the target, by one route
  after another (sip/outbound.py), as whom sip/diversion.py says. The agent sees one thing: `ReferResult` with 200
  "bridged" when the target has answered, or the target's refusal;
* `JoinLegs`: the agent has called a person itself, and connects the two. The person's leg ends for the agent there
  and then; the party's is told `ReferResult` 200 "joined".

What one party presses then goes to the other, as an event or as tones, whichever that one can (RFC 4733; keys that come
as sound pass as sound). When the agent then leaves with cause `transferred`, the two stay joined until one of them
hangs up; both count against the worker's calls. Told by the endpoint what the legs report; on its thread only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from telephony.leg import DtmfReceived, Flush, LegDisconnected, LegEvent, LegState, LegStateChanged, ReferResult
from telephony.sip.causes import Cause
from telephony.sip.outbound import OutboundAttempt

if TYPE_CHECKING:
    from telephony.sip.leg import SipLeg


@dataclass
class Bridge:
    party: SipLeg  # who was to be transferred
    target: SipLeg
    refusal: ReferResult | None = None  # what the REFER got
    attempt: OutboundAttempt | None = None  # the target's routes
    is_joined: bool = False
    is_left_by_agent: bool = False

    def other(self, leg: SipLeg) -> SipLeg:
        return self.target if leg is self.party else self.party


class CannotCall(Exception):
    """The target cannot be called; the text says why."""


FindRoutes = Callable[["SipLeg"], OutboundAttempt]
"""(party): how to call what it was referred to; CannotCall."""
CallTarget = Callable[["SipLeg", OutboundAttempt, Callable[["SipLeg"], None]], None]
"""(party, attempt, announce): calls by its present route, after `announce(target leg)`. CannotCall."""


class Bridges:
    """All bridges of one endpoint. `hidden` (by id()): legs the agent is not to hear of, the endpoint's."""

    def __init__(
        self, is_on: bool, legs: dict[str, SipLeg], hidden: dict[int, SipLeg],
        sink: Callable[[SipLeg, LegEvent], None], find_routes: FindRoutes, call_target: CallTarget,
    ) -> None:  # fmt: skip
        self._is_on, self._legs, self._hidden, self._sink = is_on, legs, hidden, sink
        self._find_routes, self._call_target = find_routes, call_target
        self._bridges: list[Bridge] = []
        self._join_later: list[Bridge] = []
        self._refused: list[tuple[SipLeg, ReferResult]] = []  # to be bridged from `poll`
        self._next_routes: list[tuple[Bridge, int]] = []  # (given up, with this status): the next one from `poll`

    def __bool__(self) -> bool:
        return bool(self._bridges)

    @property
    def legs(self) -> list[SipLeg]:
        return [leg for bridge in self._bridges for leg in (bridge.party, bridge.target)]

    def poll(self, now_s: float) -> None:
        """What pjsip's callbacks left to do, and hosts that do not answer."""
        while self._refused:
            self._bridge(*self._refused.pop(0), now_s)
        for bridge in [one for one in self._bridges if one.attempt is not None and not one.is_joined]:
            self._watch(bridge, now_s)
        while self._next_routes:
            self._try_next(*self._next_routes.pop(0), now_s)
        while self._join_later:
            self._join(self._join_later.pop(0))

    def join_legs(self, party: SipLeg, person: SipLeg) -> None:
        """Both belong to the agent; ValueError unless both are up."""
        for leg in (party, person):
            if leg is party is person or leg.state is not LegState.CONFIRMED or leg.is_joined:
                raise ValueError("both legs must be confirmed and not joined yet")
        for leg in (party, person):  # nothing the agent has still to say is for a joined party
            leg.media.local_commands.append(Flush(leg_id=leg.leg_id))
        bridge = Bridge(party, person)
        self._bridges.append(bridge)
        self._connect(bridge)
        self._sink(person, LegDisconnected(leg_id=person.leg_id, cause=Cause.TRANSFERRED, by="agent"))
        self._sink(party, ReferResult(leg_id=party.leg_id, sip_status=200, reason="joined"))

    def takes(self, leg: SipLeg, event: LegEvent) -> bool:
        """Act on what concerns a bridge; True: the agent is not to hear of it."""
        if isinstance(event, ReferResult):
            is_refused = event.sip_status >= 300 and self._is_on and leg.leg_id in self._legs
            if is_refused:
                self._refused.append((leg, event))
            return is_refused
        bridge = next((bridge for bridge in self._bridges if leg in (bridge.party, bridge.target)), None)
        if bridge is None:
            return False
        if isinstance(event, LegDisconnected) and leg.state is not LegState.DISCONNECTED:
            bridge.is_left_by_agent = True  # the agent goes, the parties stay
            return False
        if isinstance(event, DtmfReceived) and bridge.is_joined:
            bridge.other(leg).pass_key(event.digit)
            return True
        if isinstance(event, LegStateChanged) and leg is bridge.target and event.state is LegState.CONFIRMED:
            self._join_later.append(bridge)
        if isinstance(event, LegStateChanged) and event.state is LegState.DISCONNECTED:
            self._part(bridge, leg)
        return leg is bridge.target or bridge.is_left_by_agent

    def _bridge(self, party: SipLeg, refusal: ReferResult, now_s: float) -> None:
        """The party refused the REFER: call the target ourselves. What cannot be done leaves the refusal as it was."""
        try:
            attempt = self._find_routes(party)
        except CannotCall as error:
            self._not_bridged(party, refusal, error)
            return
        self._call(party, refusal, attempt, now_s)

    def _call(self, party: SipLeg, refusal: ReferResult, attempt: OutboundAttempt, now_s: float) -> None:
        """By the present route, or the first after it that can be called at all."""
        while True:
            try:
                self._call_target(
                    party, attempt, lambda leg: self._bridges.append(Bridge(party, leg, refusal, attempt))
                )
                return
            except CannotCall as error:
                self._bridges = [bridge for bridge in self._bridges if bridge.party is not party]
                if not attempt.has_next:
                    self._not_bridged(party, refusal, error)
                    return
                attempt.next(503, now_s)

    def _not_bridged(self, party: SipLeg, refusal: ReferResult, error: CannotCall) -> None:
        print(f"sip: {party.leg_id}: not bridged: {error}", file=sys.stderr)
        self._sink(party, refusal)

    def _watch(self, bridge: Bridge, now_s: float) -> None:
        attempt, target = bridge.attempt, bridge.target
        assert attempt is not None
        attempt.has_answer = attempt.has_answer or target.has_answer
        if attempt.is_stuck(now_s):
            self._bridges.remove(bridge)
            self._hidden[id(target)] = target
            target.end(Cause.NO_ANSWER)
            self._next_routes.append((bridge, 0))

    def _try_next(self, bridge: Bridge, sip_status: int, now_s: float) -> None:
        assert bridge.attempt is not None and bridge.refusal is not None
        if bridge.party.state is LegState.CONFIRMED:  # it may have hung up meanwhile
            route = bridge.attempt.next(sip_status, now_s)
            print(f"sip: {bridge.party.leg_id}: {bridge.attempt.tried[-1]}; next {route.uri}", file=sys.stderr)
            self._call(bridge.party, bridge.refusal, bridge.attempt, now_s)

    def _join(self, bridge: Bridge) -> None:
        """From `poll`, when the target's media is up."""
        self._connect(bridge)
        self._sink(bridge.party, ReferResult(leg_id=bridge.party.leg_id, sip_status=200, reason="bridged"))

    def _connect(self, bridge: Bridge) -> None:
        bridge.party.join(bridge.target)
        bridge.target.join(bridge.party)
        bridge.is_joined = True

    def _part(self, bridge: Bridge, gone: SipLeg) -> None:
        self._bridges.remove(bridge)
        other = bridge.other(gone)
        other.is_joined = False
        if gone is bridge.target or bridge.is_left_by_agent:
            gone.dispose()
        if gone is bridge.target and not bridge.is_joined:
            self._not_answered(bridge)
        else:
            if other is bridge.target or bridge.is_left_by_agent:
                self._hidden[id(other)] = other
            other.end(Cause.TRANSFERRED if bridge.is_joined else Cause.NORMAL)

    def _not_answered(self, bridge: Bridge) -> None:
        target, attempt = bridge.target, bridge.attempt
        if attempt is not None and not target.is_ended_by_us and attempt.goes_on_after(target.sip_status):
            self._next_routes.append((bridge, target.sip_status))
            return
        refusal = ReferResult(leg_id=bridge.party.leg_id, sip_status=target.sip_status, reason="target refused")
        self._sink(bridge.party, refusal)


def call_for(refer_to: str) -> tuple[str, str]:
    """(URI, number): how to call what stood in Refer-To; a tel: number goes by the trunks."""
    if refer_to.startswith("tel:"):
        return "", refer_to.removeprefix("tel:").split(";")[0]
    return refer_to, ""
