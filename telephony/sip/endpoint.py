"""pjsua2's endpoint of one media worker: its transports, its accounts (one of our own, one a trunk), the legs, and who
may enter.

SIP runs on the thread that calls `poll`; media on pjmedia's own clock thread. This file and its neighbours are the only
place that imports pjsua2 (GPL-2.0-or-later or commercial: an optional extra).
"""

from __future__ import annotations

import socket
import sys
import traceback
import uuid
from collections.abc import Callable
from functools import partial

import pjsua2 as pj

from telephony.answer_detection import AnswerDetector
from telephony.config import CODECS, WIDEBAND_CODECS, TelephonyConfig, refusal
from telephony.leg import LegDisconnected, LegEvent, LegIncoming, LegState, LegStateChanged
from telephony.security_log import SecurityLog
from telephony.sip import packet_filter
from telephony.sip.accounts import Account, TrunkAccount, host_of
from telephony.sip.bridge import Bridges, CannotCall, call_for
from telephony.sip.causes import Cause
from telephony.sip.diversion import as_whom
from telephony.sip.floods import Floods
from telephony.sip.gate import Gate, is_port_free
from telephony.sip.leg import SipLeg
from telephony.sip.levels import stop_shifting
from telephony.sip.media_port import MediaPorts, check_frame_copy
from telephony.sip.message import Fault, Message
from telephony.sip.names import Names
from telephony.sip.outbound import OutboundAttempt
from telephony.sip.packets import Packet, PjsipLog
from telephony.sip.pjsip_names import PjsipNames
from telephony.sip.referral import Referrals, may_refer
from telephony.sip.rtp_lock import RtpWatch
from telephony.sip.shed import Door, Shedder, pjsip_library
from telephony.sip.tls import secure
from telephony.sip.trunk import (
    PROXY_HEADER,
    Neighbours,
    Route,
    TrunkRefused,
    clean,
    identify,
    read_invite,
    routes_of,
)  # fmt: skip
from telephony.trunk_config import TrunkConfig
from telephony.wire import PlaceCall, SecurityEvent, TrunkChanged

Sink = Callable[[SipLeg, LegEvent], None]
Admission = Callable[[], int]
"""0 = another call may enter, else the SIP status to refuse it with."""

Notify = Callable[[TrunkChanged | SecurityEvent], None]

SipError = pj.Error
"""What pjsip refused; `.info(False)` says why. Named here so that nobody else has to import pjsua2."""

_TRANSPORT_TYPES = {
    ("udp", False): pj.PJSIP_TRANSPORT_UDP, ("udp", True): pj.PJSIP_TRANSPORT_UDP6,
    ("tcp", False): pj.PJSIP_TRANSPORT_TCP, ("tcp", True): pj.PJSIP_TRANSPORT_TCP6,
    ("tls", False): pj.PJSIP_TRANSPORT_TLS, ("tls", True): pj.PJSIP_TRANSPORT_TLS6,
}  # fmt: skip
_SRTP = {
    "off": pj.PJMEDIA_SRTP_DISABLED, "optional": pj.PJMEDIA_SRTP_OPTIONAL, "mandatory": pj.PJMEDIA_SRTP_MANDATORY,
}  # fmt: skip
_WRONG_AUTH_STATUSES = {401, 407}  # still after pjsip has answered the challenge, or without credentials (RFC 3261 §22)
_NUM_FREE_RTP_PORTS = 1000  # others may use some of them: pjsip tries 100 pairs
_FIRST_NAMES_S = 3.0  # so long the start waits for DNS; a trunk without an address by then starts as down
_BURIAL_S = 2.0  # a finished leg is kept so long, so that no callback of the clock thread meets a freed object


class SipEndpoint:
    """Everything pjsua2 of one process. `sink` hears every leg; `admission` is asked for every INVITE; `notify` is told
    what belongs to no leg."""

    def __init__(self, config: TelephonyConfig, sink: Sink, admission: Admission, notify: Notify) -> None:
        self.config = config
        self.legs: dict[str, SipLeg] = {}
        self._sink, self._admission, self._notify = sink, admission, notify
        self._names = Names(config.called_hosts, config.dns_refresh_s)
        self._names.start(_FIRST_NAMES_S)
        self._neighbours = Neighbours(config, self._names.addresses_of)
        self._rtp_watch = RtpWatch(self._neighbours.may_send_rtp, self._note)
        self._hidden: dict[int, SipLeg] = {}  # by id(): not shown to the agent yet, or never: routes given up
        self._new: list[tuple[SipLeg, str, str]] = []  # (leg, source, INVITE) to be told of from `poll`
        self._attempts: dict[str, OutboundAttempt] = {}  # outbound calls nobody has taken yet
        self._next_routes: list[tuple[SipLeg, int]] = []  # (failed leg, its status), to be tried from `poll`
        self._buried: list[tuple[float, SipLeg]] = []
        self.bridges = Bridges(
            config.bridges_refused_transfers, self.legs, self._hidden, self._sink, self._attempt_to_target,
            self._call_target,
        )  # fmt: skip
        self._referrals = Referrals(self.legs, self._hidden, self._sink)
        self._now_s = 0.0
        self._free_rtp_port = _free_even_port(config.sip_bind)
        self._transports: dict[str, int] = {}  # udp, tcp, tls -> pjsip's id
        self._endpoint = pj.Endpoint()
        self._start_library()
        self.sip_port = self._start_transports()
        self._security = SecurityLog(notify)
        floods = Floods(config.invites_per_s, config.source_invites_per_s, config.source_requests_per_s)
        self._shedder = Shedder(floods, Door(self._may_enter, self._origin_of, self._note_packet))
        self._gate: Gate | None = None
        if packet_filter.IS_AVAILABLE:
            self._gate = Gate(config.sip_bind, self.sip_port, config.tls_port, config.transports, self._security)
        self._close_gate()
        self._set_codecs()
        playback = self._endpoint.audDevManager().getPlaybackDevMedia()
        self._ports = MediaPorts(self.max_calls + 1, config, playback)
        self._account = Account(self.on_invite)
        self._account.create(self._account_settings(self._uri(config.from_user)), True)
        self._trunks = {
            trunk.name: TrunkAccount(trunk, config, self.on_invite, self._on_trunk_changed, self._names.addresses_of)
            for trunk in config.trunks
        }
        for account in self._trunks.values():
            account.start(self._account_settings(""), self._transports[account.trunk.transport])

    # ------------------------------------------------------------------- start

    def _start_library(self) -> None:
        config, settings = self.config, pj.EpConfig()
        settings.logConfig.level = settings.logConfig.consoleLevel = 1
        settings.uaConfig.threadCnt = 0
        settings.uaConfig.maxCalls = config.max_calls + 1  # one more, so that the refusal is ours
        settings.uaConfig.userAgent = config.user_agent
        media = settings.medConfig
        media.clockRate = media.sndClockRate = config.sample_rate_hz
        media.audioFramePtime = media.ptime = config.ptime_ms
        media.channelCount = 1
        media.noVad = True  # silence is sent too: RTP never stops
        media.ecTailLen = 0
        media.threadCnt = 1
        media.sndAutoCloseTime = -1  # the null device is the bridge's clock and must keep ticking
        media.maxMediaPorts = max(254, 4 * config.max_calls + 16)
        self._endpoint.libCreate()
        self._endpoint.libInit(settings)
        stop_shifting(pjsip_library())
        self._log = PjsipLog(pjsip_library())
        self._resolver = PjsipNames(pjsip_library(), self._names, 6 if ":" in config.sip_bind else 4)
        check_frame_copy()
        capacity = _library_capacity()
        self.max_calls = min(config.max_calls, capacity - 1 if capacity > 1 else capacity)
        if self.max_calls < config.max_calls:
            print(f"sip: this pjsua2 holds {capacity} calls; max_calls is {self.max_calls}", file=sys.stderr)
        self._endpoint.audDevManager().setNullDev()

    def _start_transports(self) -> int:
        """All at the same port; the first that is configured chooses it."""
        port, bind = self.config.sip_port, self.config.sip_bind
        if port and not is_port_free(bind, port, self.config.transports):
            raise OSError(f"telephony.sip_port = {port}: is in use at {bind}")
        for name in self.config.transports:
            transport = pj.TransportConfig()
            transport.port = port
            transport.boundAddress = bind
            transport.publicAddress = self.config.public_address
            if name == "tls":
                secure(transport, self.config)
            if packet_filter.IS_AVAILABLE and name == "udp":  # the gate's own socket stands at the same port
                transport.sockOptParams.sockOpts.append(pj.SockOpt(socket.SOL_SOCKET, packet_filter.SO_REUSEPORT, 1))
            transport_id = self._endpoint.transportCreate(_TRANSPORT_TYPES[name, ":" in bind], transport)
            self._transports[name] = transport_id
            port = port or int(self._endpoint.transportGetInfo(transport_id).localName.rsplit(":", 1)[1])
        self._endpoint.libStart()
        return port

    def _close_gate(self) -> None:
        """Only who is listed is heard, as the list is now."""
        self._neighbours.refresh()
        if self._gate is not None:
            self._gate.close_to(self._neighbours.networks())

    def _set_codecs(self) -> None:
        priority = {codec: 255 - index for index, codec in enumerate(self.config.codecs)}
        built_in = {codec.codecId.rsplit("/", 1)[0]: codec.codecId for codec in self._endpoint.codecEnum2()}
        for codec in self.config.codecs:
            if codec not in built_in:
                has = [known for known in (*CODECS, *WIDEBAND_CODECS) if known in built_in]
                allowed = f"this pjsua2 is built without {codec}; it has {', '.join(has)}"
                raise refusal("codecs", list(self.config.codecs), allowed)
        for codec, codec_id in built_in.items():
            self._endpoint.codecSetPriority(codec_id, priority.get(codec, 0))

    def _account_settings(self, uri: str) -> pj.AccountConfig:
        """What all accounts have in common."""
        settings = pj.AccountConfig()
        settings.idUri = uri
        transport = settings.mediaConfig.transportConfig
        transport.boundAddress = self.config.sip_bind
        transport.publicAddress = self.config.public_address
        transport.port = self.config.rtp_port_first or self._free_rtp_port
        num_ports = self.config.num_rtp_ports if self.config.rtp_port_first else _NUM_FREE_RTP_PORTS
        transport.portRange = num_ports - 2  # up to the last RTP port; without it pjsip's ports climb with every call
        settings.mediaConfig.srtpUse = _SRTP[self.config.srtp]
        settings.mediaConfig.srtpSecureSignaling = 0  # the proxy in front may have ended TLS
        settings.callConfig.timerUse = pj.PJSUA_SIP_TIMER_OPTIONAL
        return settings

    def _uri(self, user: str) -> str:
        host = self.config.public_address or self.config.sip_bind
        return f"sip:{user}@{f'[{host}]' if ':' in host else host}:{self.sip_port}"

    # -------------------------------------------------------------------- time

    def poll(self, now_s: float, wait_ms: int) -> None:
        """Let SIP happen for at most `wait_ms`."""
        self._now_s = now_s
        self._shedder.now_s = now_s
        self._endpoint.libHandleEvents(wait_ms)
        while self._new:
            try:
                self._tell_new(*self._new.pop(0))
            except Exception:  # noqa: BLE001 - one call's trouble must not end the others; it gets 503 in answer_timeout_s
                traceback.print_exc(file=sys.stderr)
        for leg in (*self.legs.values(), *self._others()):
            leg.poll()
        if self._names.poll():
            self._close_gate()
            for account in self._trunks.values():
                account.names_changed()
        while self._next_routes:
            self._try_next(*self._next_routes.pop(0))
        self.bridges.poll(now_s)
        self._referrals.poll(now_s)
        if self._gate is not None:
            self._gate.poll(now_s)
        while self._log.malformed:
            self._note_packet("malformed", *self._log.malformed.popleft())
        self._bury(now_s)

    def _bury(self, now_s: float) -> None:
        """Free finished legs. pjsua2's destructor of a Call acts on its slot number, so never while a new call has the
        slot."""
        in_use = {leg.getId() for leg in (*self.legs.values(), *self._hidden.values(), *self._others())}
        self._buried = [(at_s, leg) for at_s, leg in self._buried if at_s > now_s or leg.getId() in in_use]

    def check_deadlines(self, now_s: float) -> None:
        self._security.on_time(now_s)
        for source, num_dropped in self._shedder.floods.take_dropped().items():
            self._security.note("flood", source, "more requests than a source may send", now_s, num_dropped)
        for name, work in self._due(now_s):
            try:
                work()
            except pj.Error as error:  # one call's trouble must not end the others
                print(f"sip: {name}: {error.info(False)}", file=sys.stderr)

    def _due(self, now_s: float) -> list[tuple[str, Callable[[], None]]]:
        due: list[tuple[str, Callable[[], None]]]
        due = [(leg_id, partial(leg.on_time, now_s)) for leg_id, leg in self.legs.items()]
        due += [(leg.leg_id, partial(leg.on_time, now_s)) for leg in self.bridges.legs if leg.leg_id not in self.legs]
        due += [(name, partial(account.on_time, now_s)) for name, account in self._trunks.items()]
        for leg_id, attempt in self._attempts.items():
            leg = self.legs[leg_id]
            attempt.has_answer = attempt.has_answer or leg.has_answer
            if attempt.is_stuck(now_s):
                due.append((leg_id, partial(self._try_next, leg, 0)))
        return due

    # ------------------------------------------------------------------- calls

    def _may_enter(self, packet: Packet, _invite: Message) -> Fault | None:
        """A new INVITE, before pjsip makes a call of it."""
        if not self._neighbours.may_call_us(packet.source):
            self._note_packet("unlisted_invite", packet.source, packet.first_line)
            return Fault(403, "")
        status = self._admission()
        if not status:
            return None
        retry_after_s = self.config.retry_after_s if status == 503 else 0
        return Fault(status, "", (("Retry-After", str(retry_after_s)),) if retry_after_s else ())

    def _origin_of(self, packet: Packet, invite: Message) -> str:
        told = {PROXY_HEADER: invite.value(PROXY_HEADER.lower())}
        return _without_port(self._neighbours.origin_of(packet.source, told))

    def on_invite(self, account: pj.Account, prm: pj.OnIncomingCallParam) -> None:
        """Nothing is said here: pjsua2 aborts when its call ends within this callback. `poll` tells of it next."""
        leg = SipLeg(
            account, self.config, uuid.uuid4().hex[:16], "inbound", self._on_leg, self._ports, prm.callId,
            rtp=self._rtp_watch, on_refer=self._on_refer,
        )  # fmt: skip
        self.legs[leg.leg_id] = leg
        self._hidden[id(leg)] = leg
        self._new.append((leg, prm.rdata.srcAddress, prm.rdata.wholeMsg))

    def _tell_new(self, leg: SipLeg, source: str, invite: str) -> None:
        if self._hidden.pop(id(leg), None) is None:  # the party has given up already
            self.forget(leg)
            return
        request_uri, headers = read_invite(invite)
        source = self._neighbours.origin_of(source, headers)
        trunk = self._neighbours.trunk_of(source)
        who = identify(request_uri, headers, trunk)
        self._as_trunk_says(leg, trunk)
        leg.incoming = LegIncoming(
            leg_id=leg.leg_id, did=who.did, ani=who.ani, display_name=who.display_name, source_address=source,
            headers=headers, sample_rate_hz=self.config.sample_rate_hz, trunk=trunk.name if trunk else "",
            asserted_identity=who.asserted_identity, is_withheld=who.is_withheld,
        )  # fmt: skip
        self._sink(leg, leg.incoming)
        self._sink(leg, LegStateChanged(leg_id=leg.leg_id, state=LegState.INCOMING))
        leg.ring()

    def _as_trunk_says(self, leg: SipLeg, trunk: TrunkConfig | None) -> None:
        leg.inband_dtmf = (trunk.inband_dtmf if trunk else "") or self.config.inband_dtmf

    def place_call(self, request: PlaceCall) -> SipLeg:
        """INVITE; TrunkRefused when configuration does not allow it. The leg's first event comes with the next
        `poll`."""
        if self.num_calls >= self.max_calls:
            raise TrunkRefused("all calls of this worker are in use")
        routes = self._routes(request.uri, request.number, request.trunks)
        attempt = self._attempts[request.leg_id] = OutboundAttempt(request, routes, self._now_s)
        try:
            return self._invite(attempt.route, request, None)
        except pj.Error:
            del self._attempts[request.leg_id]
            raise

    def _routes(self, uri: str, number: str, trunks: tuple[str, ...]) -> list[Route]:
        """Hosts that answer no OPTIONS come last."""
        routes = routes_of(uri, number, trunks, self.config)
        for account in self._trunks.values():
            routes = account.routes(routes)
        return routes

    def _invite(self, route: Route, request: PlaceCall, before: SipLeg | None) -> SipLeg:
        account = self._trunks[route.trunk.name] if route.trunk else self._account
        leg = SipLeg(
            account, self.config, request.leg_id, "outbound", self._on_leg, self._ports,
            media=before.media if before else None, rtp=self._rtp_watch,
        )  # fmt: skip
        self._as_trunk_says(leg, route.trunk)
        if request.detects_answer and before is None:
            leg.media.answer = AnswerDetector(leg.leg_id, self.config.sample_rate_hz, self.config.vad_hangover_ms)
        self.legs[leg.leg_id] = leg
        try:
            leg.makeCall(route.uri, self._outbound_param(route, request))
        except pj.Error:
            if before is None:
                del self.legs[leg.leg_id]
            raise
        return leg

    def _outbound_param(self, route: Route, request: PlaceCall) -> pj.CallOpParam:
        param = pj.CallOpParam(True)
        param.opt.audioCount, param.opt.videoCount = 1, 0
        trunk, caller = route.trunk, "".join(char for char in request.from_user if char.isalnum() or char in "+-_.")
        headers = dict(request.headers)
        if trunk is not None:
            caller = caller or trunk.caller_id or trunk.username or self.config.from_user
            uri = f"sip:{caller}@{trunk.aor_host}"
            if trunk.is_identity_trusted:
                headers.setdefault("P-Asserted-Identity", f"<{uri}>")
        else:
            uri = self._uri(caller or self.config.from_user)
        if trunk is not None or request.from_user or request.display_name:
            name = clean(request.display_name).replace('"', "").replace("\\", "")
            param.txOption.localUri = f'"{name}" <{uri}>' if name else f"<{uri}>"
        for key, value in headers.items():
            header = pj.SipHeader()
            header.hName, header.hValue = clean(key), clean(value)
            param.txOption.headers.append(header)
        return param

    def _try_next(self, failed: SipLeg, sip_status: int) -> None:
        """The same call by its next route. The failed one is ended unseen."""
        attempt = self._attempts.get(failed.leg_id)
        if attempt is None or self.legs.get(failed.leg_id) is not failed:
            return
        if failed.state is not LegState.DISCONNECTED:
            self._hidden[id(failed)] = failed
            failed.end(Cause.NO_ANSWER)
        route = attempt.next(sip_status, self._now_s)
        print(f"sip: {failed.leg_id}: {attempt.tried[-1]}; next {route.uri}", file=sys.stderr)
        try:
            self._invite(route, attempt.request, failed)
        except pj.Error:
            if attempt.has_next:
                self._try_next(self.legs[failed.leg_id], 503)
                return
            del self._attempts[failed.leg_id]
            leg = self.legs[failed.leg_id]
            self._sink(leg, LegStateChanged(leg_id=leg.leg_id, state=LegState.DISCONNECTED))
            self._sink(leg, LegDisconnected(leg_id=leg.leg_id, cause=Cause.NETWORK_ERROR, sip_status=503))

    def _note_packet(self, kind: str, source: str, detail: str) -> None:
        """Of one source, whichever port it sends from: a scan uses many."""
        self._security.note(kind, _without_port(source), detail, self._now_s)

    def _on_trunk_changed(self, changed: TrunkChanged) -> None:
        if changed.state == "refused" and changed.sip_status in (*_WRONG_AUTH_STATUSES, 403):
            self._note_wrong_auth(changed.host, changed.sip_status)
        self._notify(changed)

    def _note_wrong_auth(self, host: str, sip_status: int) -> None:
        self._security.note("wrong_auth", host, f"our credentials were refused with {sip_status}", self._now_s)

    def _note(self, kind: str, source: str, detail: str, count: int) -> None:
        self._security.note(kind, source, detail, self._now_s, count)

    def _on_leg(self, leg: SipLeg, event: LegEvent) -> None:
        is_over = isinstance(event, LegStateChanged) and event.state is LegState.DISCONNECTED
        if is_over:
            self._buried.append((self._now_s + _BURIAL_S, leg))
        if self.bridges.takes(leg, event) or self._referrals.takes(leg, event):
            return
        attempt = self._attempts.get(leg.leg_id)
        if attempt is not None and id(leg) not in self._hidden:
            if is_over and leg.sip_status in _WRONG_AUTH_STATUSES:
                self._note_wrong_auth(host_of(attempt.route.uri), leg.sip_status)
            if is_over and not leg.is_ended_by_us and attempt.goes_on_after(leg.sip_status):
                self._hidden[id(leg)] = leg
                self._next_routes.append((leg, leg.sip_status))
            elif is_over or (isinstance(event, LegStateChanged) and event.state is not LegState.CALLING):
                del self._attempts[leg.leg_id]
            elif attempt.tried:
                return  # CALLING again is no news
        if id(leg) in self._hidden:
            if isinstance(event, LegDisconnected):
                del self._hidden[id(leg)]
            if is_over and leg.has_port:  # one that was bridged; a route given up has none, and its media is another's
                leg.dispose()
            return
        self._sink(leg, event)
        if is_over:
            leg.dispose()

    # ----------------------------------------------------------------- bridges

    @property
    def num_calls(self) -> int:
        """All that use a slot, the agent's and the joined ones."""
        return len({id(leg) for leg in (*self.legs.values(), *self._others())})

    @property
    def num_held(self) -> int:
        """Call objects of any kind, those that wait to be freed too."""
        return self.num_calls + len(self._hidden) + len(self._buried) + len(self._attempts)

    def _others(self) -> list[SipLeg]:
        return [*self.bridges.legs, *self._referrals.legs]

    def _on_refer(self, leg: SipLeg, target: str) -> SipLeg | None:
        """The party sends us elsewhere; None = refused."""
        trunk = leg.incoming.trunk if leg.incoming else ""
        is_busy = leg.is_joined or self._referrals.is_busy(leg) or self.num_calls >= self.max_calls
        if leg.state is not LegState.CONFIRMED or is_busy or not may_refer(self.config, trunk, target):
            return None
        second = SipLeg(  # by the account of the first dialog: pjsua2 asserts it
            leg.account, self.config, leg.leg_id, "outbound", self._on_leg, self._ports, media=leg.media,
            rtp=self._rtp_watch, on_refer=self._on_refer,
        )  # fmt: skip
        self._referrals.begin(leg, second, target)
        return second

    def join(self, leg: SipLeg, other: SipLeg | None) -> None:
        """See `wire.JoinLegs`; ValueError when it cannot be."""
        if other is None:
            raise ValueError("the other leg is gone")
        self.bridges.join_legs(leg, other)

    def _attempt_to_target(self, party: SipLeg) -> OutboundAttempt:
        """The ways to call what a party was referred to, who has refused our REFER; CannotCall."""
        try:
            uri, number = call_for(party.referred_to)
            routes = self._routes(uri, number, ())
        except TrunkRefused as error:
            raise CannotCall(str(error)) from error
        return OutboundAttempt(PlaceCall(leg_id=uuid.uuid4().hex[:16]), routes, self._now_s)

    def _call_target(self, party: SipLeg, attempt: OutboundAttempt, announce: Callable[[SipLeg], None]) -> None:
        """An INVITE of ours by the present route."""
        if party.state is not LegState.CONFIRMED or self.num_calls >= self.max_calls:
            raise CannotCall("no call is free")
        route = attempt.route
        own_host = self.config.public_address or self.config.sip_bind
        from_user, headers = as_whom(party.incoming, route.trunk, own_host)
        request = PlaceCall(leg_id=attempt.request.leg_id, from_user=from_user, headers=headers)
        account = self._trunks[route.trunk.name] if route.trunk else self._account
        target = SipLeg(
            account, self.config, request.leg_id, "outbound", self._on_leg, self._ports, rtp=self._rtp_watch
        )
        self._as_trunk_says(target, route.trunk)
        announce(target)
        try:
            target.makeCall(route.uri, self._outbound_param(route, request))
        except pj.Error as error:
            raise CannotCall(self.reason_of(error)) from error

    def forget(self, leg: SipLeg) -> None:
        """The agent has been told of the end."""
        self.legs.pop(leg.leg_id, None)

    def reason_of(self, error: Exception) -> str | None:
        """What configuration does not allow, or pjsip refused, in its words."""
        if isinstance(error, TrunkRefused):
            return str(error)
        return str(error.info(False)) if isinstance(error, pj.Error) else None

    def end_all(self, cause: Cause) -> None:
        for leg in {id(leg): leg for leg in (*self.legs.values(), *self._others())}.values():
            leg.end(cause)


def _library_capacity() -> int:
    """How many calls this build of pjsua2 holds (the wheel: 4); asked of the library itself, pjsua2 has no call for
    it."""
    return int(pjsip_library().pjsua_call_get_max_count())


def _without_port(source: str) -> str:
    return source.rpartition(":")[0] or source


def _free_even_port(address: str) -> int:
    """A free UDP port to start from; pjsip takes the next pairs from there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return min(int(probe.getsockname()[1]) & ~1, 65536 - _NUM_FREE_RTP_PORTS)
