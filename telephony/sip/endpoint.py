"""pjsua2's endpoint of one media worker: one UDP transport, one account, the legs, and who may enter.

SIP runs on the thread that calls `poll`; media on pjmedia's own clock thread. This file and its neighbours are the only
place that imports pjsua2 (GPL-2.0-or-later or commercial: an optional extra).
"""

from __future__ import annotations

import ctypes
import socket
import sys
import traceback
import uuid
from collections.abc import Callable

import pjsua2 as pj

from telephony.config import TelephonyConfig
from telephony.leg import LegEvent, LegIncoming, LegState, LegStateChanged
from telephony.sip.causes import Cause, cause_of_status
from telephony.sip.leg import SipLeg
from telephony.sip.media_port import MediaPorts, check_frame_copy
from telephony.sip.trunk import (
    TrunkRefused,
    caller_of,
    check_outbound,
    clean,
    is_allowed_source,
    read_invite,
    split_uri,
)
from telephony.wire import PlaceCall

Sink = Callable[[SipLeg, LegEvent], None]
Admission = Callable[[], int]
"""0 = another call may enter, else the SIP status to refuse it with."""

SipError = pj.Error
"""What pjsip refused; `.info(False)` says why. Named here so that nobody else has to import pjsua2."""

_BURIAL_S = 2.0  # a finished leg is kept so long, so that no callback of the clock thread meets a freed object


class _Account(pj.Account):
    def __init__(self, endpoint: SipEndpoint) -> None:
        super().__init__()
        self._endpoint = endpoint

    def onIncomingCall(self, prm: pj.OnIncomingCallParam) -> None:
        try:
            self._endpoint.on_invite(prm)
        except Exception:  # noqa: BLE001 - must not unwind into pjsip's C stack; the INVITE then times out
            traceback.print_exc(file=sys.stderr)


class SipEndpoint:
    """Everything pjsua2 of one process. `sink` hears every leg; `admission` is asked for every INVITE."""

    def __init__(self, config: TelephonyConfig, sink: Sink, admission: Admission) -> None:
        self.config = config
        self.legs: dict[str, SipLeg] = {}
        self._sink, self._admission = sink, admission
        self._refused: dict[str, SipLeg] = {}  # being answered with a final status, never shown to the agent
        self._buried: list[tuple[float, SipLeg]] = []
        self._now_s = 0.0
        self._endpoint = pj.Endpoint()
        self._start_library()
        self.sip_port = self._start_transport()
        self._set_codecs()
        playback = self._endpoint.audDevManager().getPlaybackDevMedia()
        self._ports = MediaPorts(self.max_calls + 1, config, playback)
        self._account = self._start_account()

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
        check_frame_copy()
        capacity = _library_capacity()
        self.max_calls = min(config.max_calls, capacity - 1 if capacity > 1 else capacity)
        if self.max_calls < config.max_calls:
            print(f"sip: this pjsua2 holds {capacity} calls; max_calls is {self.max_calls}", file=sys.stderr)
        self._endpoint.audDevManager().setNullDev()

    def _start_transport(self) -> int:
        transport = pj.TransportConfig()
        transport.port = self.config.sip_port
        transport.boundAddress = self.config.sip_bind
        transport.publicAddress = self.config.public_address
        transport_id = self._endpoint.transportCreate(pj.PJSIP_TRANSPORT_UDP, transport)
        self._endpoint.libStart()
        if self.config.sip_port:
            return self.config.sip_port
        return int(self._endpoint.transportGetInfo(transport_id).localName.rsplit(":", 1)[1])

    def _set_codecs(self) -> None:
        priority = {codec: 255 - index for index, codec in enumerate(self.config.codecs)}
        for codec in self._endpoint.codecEnum2():
            self._endpoint.codecSetPriority(codec.codecId, priority.get(codec.codecId.rsplit("/", 1)[0], 0))

    def _start_account(self) -> _Account:
        settings = pj.AccountConfig()
        settings.idUri = self._uri(self.config.from_user)
        transport = settings.mediaConfig.transportConfig
        transport.boundAddress = self.config.sip_bind
        transport.publicAddress = self.config.public_address
        transport.port = self.config.rtp_port_first or _free_even_port(self.config.sip_bind)
        settings.callConfig.timerUse = pj.PJSUA_SIP_TIMER_OPTIONAL
        account = _Account(self)
        account.create(settings)
        return account

    def _uri(self, user: str) -> str:
        host = self.config.public_address or self.config.sip_bind
        return f"sip:{user}@{f'[{host}]' if ':' in host else host}:{self.sip_port}"

    # -------------------------------------------------------------------- time

    def poll(self, now_s: float, wait_ms: int) -> None:
        """Let SIP happen for at most `wait_ms`."""
        self._now_s = now_s
        self._endpoint.libHandleEvents(wait_ms)
        self._bury(now_s)

    def _bury(self, now_s: float) -> None:
        """Free finished legs. pjsua2's destructor of a Call acts on its slot number, so never while a new call has the
        slot."""
        in_use = {leg.getId() for leg in (*self.legs.values(), *self._refused.values())}
        self._buried = [(at_s, leg) for at_s, leg in self._buried if at_s > now_s or leg.getId() in in_use]

    def check_deadlines(self, now_s: float) -> None:
        for leg in list(self.legs.values()):
            try:
                leg.on_time(now_s)
            except pj.Error as error:  # one call's trouble must not end the others
                print(f"sip: {leg.leg_id}: {error.info(False)}", file=sys.stderr)

    # ------------------------------------------------------------------- calls

    def on_invite(self, prm: pj.OnIncomingCallParam) -> None:
        leg = SipLeg(
            self._account, self.config, uuid.uuid4().hex[:16], "inbound", self._on_leg, self._ports, prm.callId
        )
        source = prm.rdata.srcAddress
        status = self._admission() if is_allowed_source(source, self.config) else 403
        if status:
            self._refused[leg.leg_id] = leg
            leg.refuse(status, self.config.retry_after_s if status == 503 else 0, cause_of_status(status))
            return
        request_uri, headers = read_invite(prm.rdata.wholeMsg)
        ani, display_name = caller_of(headers.get("From", headers.get("f", "")))
        try:
            did = split_uri(request_uri)[0]
        except ValueError:
            did = ""
        self.legs[leg.leg_id] = leg
        leg.incoming = LegIncoming(
            leg_id=leg.leg_id, did=clean(did), ani=clean(ani), display_name=clean(display_name), source_address=source,
            headers=headers, sample_rate_hz=self.config.sample_rate_hz,
        )  # fmt: skip
        self._sink(leg, leg.incoming)
        self._sink(leg, LegStateChanged(leg_id=leg.leg_id, state=LegState.INCOMING))
        leg.ring()

    def place_call(self, request: PlaceCall) -> SipLeg:
        """INVITE; TrunkRefused when the host is not configured. The leg's first event comes with the next `poll`."""
        check_outbound(request.uri, self.config)
        leg = SipLeg(self._account, self.config, request.leg_id, "outbound", self._on_leg, self._ports)
        param = pj.CallOpParam(True)
        param.opt.audioCount, param.opt.videoCount = 1, 0
        if request.from_user or request.display_name:
            name = clean(request.display_name).replace('"', "").replace("\\", "")
            user = (
                "".join(char for char in request.from_user if char.isalnum() or char in "+-_.") or self.config.from_user
            )
            param.txOption.localUri = f'"{name}" <{self._uri(user)}>' if name else f"<{self._uri(user)}>"
        for key, value in request.headers.items():
            header = pj.SipHeader()
            header.hName, header.hValue = clean(key), clean(value)
            param.txOption.headers.append(header)
        self.legs[leg.leg_id] = leg
        try:
            leg.makeCall(request.uri, param)
        except pj.Error:
            del self.legs[leg.leg_id]
            raise
        return leg

    def _on_leg(self, leg: SipLeg, event: LegEvent) -> None:
        is_over = isinstance(event, LegStateChanged) and event.state is LegState.DISCONNECTED
        if leg.leg_id not in self._refused:
            self._sink(leg, event)
        if is_over:
            leg.dispose()
            self._refused.pop(leg.leg_id, None)
            self._buried.append((self._now_s + _BURIAL_S, leg))

    def forget(self, leg: SipLeg) -> None:
        """The agent has been told of the end."""
        self.legs.pop(leg.leg_id, None)

    def reason_of(self, error: Exception) -> str | None:
        """What configuration does not allow, or pjsip refused, in its words."""
        if isinstance(error, TrunkRefused):
            return str(error)
        return str(error.info(False)) if isinstance(error, pj.Error) else None

    def end_all(self, cause: Cause) -> None:
        for leg in list(self.legs.values()):
            leg.end(cause)


def _library_capacity() -> int:
    """How many calls this build of pjsua2 holds (the wheel: 4); asked of the library itself, pjsua2 has no call for
    it."""
    module = sys.modules.get("_pjsua2") or sys.modules.get("pjsua2._pjsua2")
    library = ctypes.CDLL(getattr(module, "__file__", None))
    return int(library.pjsua_call_get_max_count())


def _free_even_port(address: str) -> int:
    """A free UDP port to start from; pjsip takes the next pairs from there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return min(int(probe.getsockname()[1]) & ~1, 60000)
