"""One SIP dialog as a leg: pjsua2's callbacks become LegEvents, LegCommands become SIP (RFC 3261).

Lives in a media worker and on its main thread only; sample data is `leg_media.py`'s. Knows no agent and no
socket: it tells a `sink`. The media port runs from CONFIRMED to the end, on hold too, because it is the leg's clock.
"""

from __future__ import annotations

import functools
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

import pjsua2 as pj

from telephony.config import TelephonyConfig
from telephony.dtmf import KEYS, DtmfDetector, tones
from telephony.leg import (
    Answer,
    DtmfReceived,
    Hangup,
    Hold,
    HoldChanged,
    LegCommand,
    LegDisconnected,
    LegEvent,
    LegIncoming,
    LegState,
    LegStateChanged,
    Play,
    Progress,
    Refer,
    Reject,
    SendDtmf,
    StopAnswerDetection,
    Unhold,
)  # fmt: skip
from telephony.leg_media import LegMedia
from telephony.sip import packet_filter, rtp_lock
from telephony.sip.causes import Cause, cause_of_hangup, cause_of_status
from telephony.sip.levels import put_right
from telephony.sip.media_health import MediaCounts, health_of
from telephony.sip.media_port import MediaPort, MediaPorts
from telephony.sip.refer import INBOUND_REFER_STATUS, OutboundRefer, check_refer_to
from telephony.sip.rtp_lock import OwnSource, RtpLock, RtpWatch
from telephony.sip.trunk import clean
from telephony.states import check_legal

_STATES = {
    pj.PJSIP_INV_STATE_NULL: LegState.NULL,
    pj.PJSIP_INV_STATE_CALLING: LegState.CALLING,
    pj.PJSIP_INV_STATE_INCOMING: LegState.INCOMING,
    pj.PJSIP_INV_STATE_EARLY: LegState.EARLY,
    pj.PJSIP_INV_STATE_CONNECTING: LegState.CONNECTING,
    pj.PJSIP_INV_STATE_CONFIRMED: LegState.CONFIRMED,
    pj.PJSIP_INV_STATE_DISCONNECTED: LegState.DISCONNECTED,
}
_DECLINE = 603
OnRefer = Callable[["SipLeg", str], "SipLeg | None"]
"""(leg, Refer-To): the leg that pjsip shall call the target on; None = 603."""
DTMF_METHODS = ("auto", "rfc4733", "info", "inband")
_NETWORK_STATUSES = {408, 503}  # what pjsip itself reports for no answer and for no transport


def _guarded(callback: Callable[..., None]) -> Callable[..., None]:
    """An exception must not unwind into pjsip's C stack: it is printed, and the call goes on."""

    @functools.wraps(callback)
    def wrapper(self: Any, prm: Any) -> None:
        try:
            callback(self, prm)
        except Exception:  # noqa: BLE001 - see above
            traceback.print_exc(file=sys.stderr)

    return wrapper


class SipLeg(pj.Call):
    """One dialog. `dispose` after DISCONNECTED, and not from within a pjsip callback."""

    can_transfer = True

    def __init__(
        self, account: pj.Account, config: TelephonyConfig, leg_id: str, direction: str,
        sink: Callable[[SipLeg, LegEvent], None], ports: MediaPorts, call_id: int = pj.PJSUA_INVALID_ID,
        media: LegMedia | None = None, rtp: RtpWatch | None = None, on_refer: OnRefer | None = None,
    ) -> None:  # fmt: skip
        """`media`: of the leg this one takes the place of (the same call by another route). `rtp`: knows who may send,
        and is told who forges."""
        super().__init__(account, call_id)
        self.account, self.leg_id, self.direction = account, leg_id, direction
        self.state = LegState.INCOMING if direction == "inbound" else LegState.NULL
        self.media = media or LegMedia(leg_id, config)
        self._ports = ports
        self._port: MediaPort | None = None  # from CONFIRMED to the end
        self.incoming: LegIncoming | None = None
        self.refer: OutboundRefer | None = None
        self._config, self._sink = config, sink
        self._cause: Cause | None = None  # set when it is we who end the call
        self._has_media = False
        self._started_at_s = 0.0
        self._rtp_packets, self._rtp_changed_at_s = -1, 0.0
        self.sip_status = 0  # of the latest answer
        self._redirect_status = 0  # the 3xx that ended the call
        self.has_answer = False  # the party's host said something, if only 100 Trying
        self._is_early = False  # our early media is on its way
        self._is_silenced = False  # the party told us that it will send nothing (RFC 3264 §8.4)
        self._hold_by = ""  # caller | agent while on hold
        self._confirmed_at_s = 0.0
        self._is_judged = False  # the media's health was reported
        self._loudest = 0
        self._num_tones = 0
        self.is_joined = False  # with another leg (sip/bridge.py)
        self.referred_to = ""
        self.inband_dtmf = config.inband_dtmf  # its trunk may want something else
        self._lock = RtpLock()
        self._packets_at_lock = 0
        self._rtp = rtp
        self._on_refer = on_refer
        self.is_waiting = False  # for another leg's media: see `take_over`
        self._keys: deque[DtmfReceived] = deque()  # not told yet: pjmedia's thread appends, the main one takes

    # ----------------------------------------------------------------- commands

    def carry_out(self, command: LegCommand, now_s: float) -> None:
        """A signalling command; LegError or ValueError when it cannot be done."""
        check_legal(command, self.state)
        match command:
            case Answer():
                self.answer(_call_param(200))
            case Progress():
                self._is_early = True
                self.answer(_call_param(183))
            case Hold():
                self.setHold(_call_param(0))
            case Unhold():
                param = _call_param(0)
                param.opt.flag = pj.PJSUA_CALL_UNHOLD
                self.reinvite(param)
            case SendDtmf(digits=digits, method=method):
                self.send_dtmf(digits, method)
            case StopAnswerDetection():
                self.media.answer = None
            case Reject(sip_status=sip_status, retry_after_s=retry_after_s):
                self.refuse(sip_status, retry_after_s, cause_of_status(sip_status))
            case Hangup(cause=cause) if self.state is not LegState.DISCONNECTED:
                self.end(cause_of_hangup(cause))
            case Refer(refer_to=refer_to):
                check_refer_to(refer_to)
                if self.refer is not None and not self.refer.is_done:
                    raise ValueError("a REFER is already under way")
                self.referred_to = refer_to
                self.refer = OutboundRefer(self.leg_id, now_s, self._config.refer_timeout_s)
                self.xfer(f"<{refer_to}>", pj.CallOpParam(True))

    def send_dtmf(self, digits: str, method: str = "auto") -> None:
        """Keys out; methods: see `telephony.leg.SendDtmf`. ValueError for a key or a method that is none."""
        if method not in DTMF_METHODS or not KEYS.fullmatch(digits):
            raise ValueError("digits must be 0-9 * # A-D, the method rfc4733, info, inband or auto")
        if method == "auto":
            method = "rfc4733" if self.getStreamInfo(0).audTxEventPt > 0 else "inband"
        if method == "inband":
            self._num_tones += 1
            self.media.local_commands.append(Play(
                leg_id=self.leg_id, item_id=f"dtmf-{self._num_tones}", pcm=tones(digits, self._config.sample_rate_hz),
                sample_rate_hz=self._config.sample_rate_hz, is_final=True,
            ))  # fmt: skip
            return
        param = pj.CallSendDtmfParam()
        param.digits = digits
        param.method = pj.PJSUA_DTMF_METHOD_SIP_INFO if method == "info" else pj.PJSUA_DTMF_METHOD_RFC2833
        self.sendDtmf(param)

    def pass_key(self, digit: str) -> None:
        """What the other party of a bridge has pressed. One that is leaving gets it no more."""
        try:
            self.send_dtmf(digit)
        except pj.Error as error:
            print(f"sip: {self.leg_id}: key not passed: {error.info(False)}", file=sys.stderr)

    @property
    def has_port(self) -> bool:
        return self._port is not None

    def join(self, other: SipLeg) -> None:
        """Let the other party hear this one."""
        self.is_joined = True
        self.getAudioMedia(-1).startTransmit(other.getAudioMedia(-1))

    def take_over(self, before: SipLeg) -> None:
        """Go on with the clock, the play-out and the agent of a leg whose party sent us here."""
        port, before._port = before._port, None
        if port is not None and before.isActive() and before._has_media:
            stream = before.getAudioMedia(-1)
            port.stopTransmit(stream)
            stream.stopTransmit(port)
        self._port, self.is_waiting = port, False
        self.media.is_held = False
        self.incoming = before.incoming
        self._start_media()

    @property
    def is_ended_by_us(self) -> bool:
        return self._cause is not None

    def ring(self) -> None:
        """180 Ringing while the agent makes up its mind."""
        self.answer(_call_param(180))

    def refuse(self, sip_status: int, retry_after_s: int, cause: Cause) -> None:
        if self.state is LegState.CONNECTING:  # it has had its final answer; only the ACK is missing
            self.end(cause)
            return
        if self._cause is not None:
            return
        self._cause = cause
        param = _call_param(sip_status)
        if retry_after_s:
            header = pj.SipHeader()
            header.hName, header.hValue = "Retry-After", str(retry_after_s)
            param.txOption.headers.append(header)
        self.answer(param)

    def end(self, cause: Cause) -> None:
        """BYE, CANCEL or a final refusal, whichever the state asks for."""
        if self.state is LegState.DISCONNECTED or self._cause is not None:
            return
        if cause is Cause.TRANSFERRED and self.is_joined:  # the two parties go on without the agent
            self._sink(self, LegDisconnected(leg_id=self.leg_id, cause=cause, by="agent"))
            return
        self._cause = cause
        if not self.isActive():  # the party ended it this very moment; pjsip tells us next
            return
        self.hangup(
            _call_param(_DECLINE if self.direction == "inbound" and self.state is not LegState.CONFIRMED else 0)
        )

    def on_time(self, now_s: float) -> None:
        """Deadlines: the answer, the REFER's outcome, and a party whose RTP stopped."""
        self._started_at_s = self._started_at_s or now_s
        waited_s = now_s - self._started_at_s
        is_unanswered = self.state in (LegState.NULL, LegState.CALLING, LegState.INCOMING, LegState.EARLY)
        if is_unanswered and self.direction == "inbound" and waited_s > self._config.answer_timeout_s:
            self.refuse(503, self._config.retry_after_s, Cause.OVERLOADED)
        elif is_unanswered and self.direction == "outbound" and waited_s > self._config.no_answer_timeout_s:
            self.end(Cause.NO_ANSWER)
        if self.refer is not None:
            result = self.refer.on_time(now_s)
            if result is not None:
                self._sink(self, result)
        if self.state is LegState.CONFIRMED and self._has_media:
            self._judge_health(now_s)
            packets = self._received_packets()
            if packets != self._rtp_packets or self.media.is_held or self._is_silenced:
                self._rtp_packets, self._rtp_changed_at_s = packets, now_s
            elif self._config.rtp_timeout_s and now_s - self._rtp_changed_at_s > self._config.rtp_timeout_s:
                self.end(Cause.MEDIA_TIMEOUT)

    def poll(self) -> None:
        """What happened on pjmedia's threads since the last time: keys, and RTP of other sources."""
        self.tell_keys()
        if self._lock.own is not None:
            self._watch_source(self._lock.own)

    def tell_keys(self) -> None:
        while self._keys:
            self._sink(self, self._keys.popleft())

    def story(self) -> list[LegEvent]:
        """What a new agent has to be told about a leg that is older than it."""
        codec = self._codec() if self.state is LegState.CONFIRMED else ""
        changed = LegStateChanged(leg_id=self.leg_id, state=self.state, sample=self.media.sample, codec=codec)
        held = [HoldChanged(leg_id=self.leg_id, is_held=True, by=self._hold_by)] if self._hold_by else []
        return [changed, *held] if self.incoming is None else [self.incoming, changed, *held]

    def dispose(self) -> None:
        """After DISCONNECTED: no tick comes any more."""
        self.media.attach(None)
        self._lock.open()
        if self._port is not None:
            self._ports.take_back(self._port)
            self._port = None

    # ---------------------------------------------------------- pjsip callbacks

    @_guarded
    def onCallState(self, prm: pj.OnCallStateParam) -> None:
        info = self.getInfo()
        was_confirmed = self.state is LegState.CONFIRMED
        state = _STATES[info.state]
        self.sip_status = self._redirect_status or info.lastStatusCode  # pjsip's own, after a 3xx, is 487
        if state is self.state:
            return
        self.tell_keys()  # they came before
        if state is LegState.DISCONNECTED and self._cause is None and self.refer is not None:
            if (unknown := self.refer.on_party_gone()) is not None:
                self._sink(self, unknown)
        self.state = state
        if state is LegState.CONFIRMED and not self.is_waiting:
            self.media.confirmed(time.monotonic())
        codec = self._codec() if state is LegState.CONFIRMED else ""
        self._sink(self, LegStateChanged(leg_id=self.leg_id, state=state, sample=self.media.sample, codec=codec))
        if state is LegState.CONFIRMED and self._cause is None:
            self._start_media()  # after the news, so that the agent hears of the answer before it hears audio
        if state is LegState.DISCONNECTED:
            self._lock.open()
            self._sink(self, self._disconnected(self.sip_status, was_confirmed))

    @_guarded
    def onCallMediaState(self, prm: pj.OnCallMediaStateParam) -> None:
        info = self.getInfo()  # named, because SWIG frees it with its last reference while `media` points into it
        statuses = [media.status for media in info.media if media.type == pj.PJMEDIA_TYPE_AUDIO]
        self._has_media = any(status != pj.PJSUA_CALL_MEDIA_NONE for status in statuses)
        if not self.is_waiting:
            self.media.is_held = pj.PJSUA_CALL_MEDIA_ACTIVE not in statuses
        audio = [media.dir for media in info.media if media.type == pj.PJMEDIA_TYPE_AUDIO]
        self._is_silenced = not any(direction & pj.PJMEDIA_DIR_DECODING for direction in audio)
        self._lock_source()  # there may be a new stream from another address
        if self.state is LegState.CONFIRMED and self._cause is None:
            self._start_media()
            self._note_hold(statuses)
        elif self._is_early and self.direction == "inbound" and self._has_media:
            self._start_media()

    @_guarded
    def onCallTsxState(self, prm: pj.OnCallTsxStateParam) -> None:
        if prm.e.type == pj.PJSIP_EVENT_TSX_STATE and prm.e.body.tsxState.type == pj.PJSIP_EVENT_RX_MSG:
            self.has_answer = True

    def onCallRedirected(self, prm: pj.OnCallRedirectedParam) -> int:
        """3xx (RFC 3261 §8.1.3.4): never followed, or who is called would choose whom we call, and pay for, next."""
        self._note_redirect(prm)
        return int(pj.PJSIP_REDIRECT_STOP)

    @_guarded
    def _note_redirect(self, prm: pj.OnCallRedirectedParam) -> None:
        if prm.e.type == pj.PJSIP_EVENT_TSX_STATE:
            self._redirect_status = prm.e.body.tsxState.tsx.statusCode
        print(f"sip: {self.leg_id}: {self._redirect_status} to {clean(prm.targetUri)}: not followed", file=sys.stderr)

    @_guarded
    def onDtmfDigit(self, prm: pj.OnDtmfDigitParam) -> None:
        # On pjmedia's thread, unlike the others; the sink and the agent's link belong to the main one.
        self._keys.append(DtmfReceived(leg_id=self.leg_id, digit=prm.digit, sample=self.media.sample))

    @_guarded
    def onCallTransferRequest(self, prm: pj.OnCallTransferRequestParam) -> None:
        second = self._on_refer(self, prm.dstUri.strip("<> ")) if self._on_refer is not None else None
        if second is None:
            prm.statusCode = INBOUND_REFER_STATUS
        else:
            prm.statusCode, prm.newCall = 202, second

    @_guarded
    def onCallReplaceRequest(self, prm: pj.OnCallReplaceRequestParam) -> None:
        prm.statusCode = INBOUND_REFER_STATUS

    @_guarded
    def onCallTransferStatus(self, prm: pj.OnCallTransferStatusParam) -> None:
        if self.refer is None:
            return
        result = self.refer.on_status(prm.statusCode, prm.reason, prm.finalNotify)
        if result is not None:
            prm.cont = False
            self._sink(self, result)

    # ------------------------------------------------------------------ private

    def _start_media(self) -> None:
        """Join port and stream; again after a re-INVITE, which may have made a new stream."""
        if self.is_waiting:
            return
        if self._port is None:
            self._port = self._ports.lend(self.media)
        if self._has_media and not self.media.is_held:
            stream, negotiated = self.getAudioMedia(-1), self.getStreamInfo(0)
            put_right(stream, negotiated.codecName)
            listens = self.inband_dtmf
            has_events = negotiated.audRxEventPt > 0  # RFC 4733 was negotiated
            if listens == "off" or (listens == "auto" and has_events):
                self.media.keys = None
            elif self.media.keys is None:
                self.media.keys = DtmfDetector(self._config.sample_rate_hz)
            self._port.startTransmit(stream)
            stream.startTransmit(self._port)

    def _note_hold(self, statuses: list[int]) -> None:
        """Say who put whom on hold, once."""
        by = "agent" if pj.PJSUA_CALL_MEDIA_LOCAL_HOLD in statuses else "caller" if self.media.is_held else ""
        if by != self._hold_by:
            before, self._hold_by = self._hold_by, by
            self._sink(self, HoldChanged(leg_id=self.leg_id, is_held=bool(by), by=by or before))

    def _lock_source(self) -> None:
        """RTP comes from where the SDP says, or else from who shows to be the party: see sip/rtp_lock.py."""
        if self._rtp is None or not self._config.is_rtp_locked or not packet_filter.IS_AVAILABLE:
            return
        if not self._has_media or self.media.is_held or self._is_silenced:  # the SDP may name nobody (RFC 3264 §8.4)
            self._lock.open()
            return
        stream, transport = self.getStreamInfo(0), self.getMedTransportInfo(0)
        payload_types = frozenset({stream.rxPt, stream.audRxEventPt, rtp_lock.COMFORT_NOISE_PT})
        self._packets_at_lock = self._received_packets()
        own = OwnSource(stream.remoteRtpAddress, payload_types, self._may_send)
        self._lock.close_to(int(transport.localRtpName.rsplit(":", 1)[1]), own)

    def _may_send(self, address: str) -> bool:
        """The networks that may send us anything; the SDP's host; and who a trusted proxy says is calling."""
        own, signalling = self._lock.own, self.incoming.source_address if self.incoming else ""
        known = {rtp_lock.host_of(source) for source in (own.promised if own else "", signalling)}
        return address in known or (self._rtp is not None and self._rtp.may_send(address))

    def _watch_source(self, own: OwnSource) -> None:
        if not own.is_heard and self._received_packets() > self._packets_at_lock:
            own.is_heard = True
        strangers = self._lock.poll()
        for source, count in strangers.items():
            detail = f"RTP from port {source.rpartition(':')[2]} was kept out; the call's own comes from {own.address}"
            if self._rtp is not None:
                self._rtp.note("rtp_source", rtp_lock.host_of(source), detail, count)

    def _judge_health(self, now_s: float) -> None:
        """Once, `health_after_s` after the answer; the level is looked at until then."""
        if self._is_judged:
            return
        self._confirmed_at_s = self._confirmed_at_s or now_s
        stream, transport = self.getStreamStat(0), self.getMedTransportInfo(0)
        self._loudest = max(self._loudest, self.getAudioMedia(-1).getTxLevel())
        if now_s - self._confirmed_at_s < self._config.health_after_s:
            return
        self._is_judged = True
        received, sent = stream.rtcp.rxStat, stream.rtcp.txStat
        counts = MediaCounts(
            packets_in=received.pkt, packets_out=sent.pkt, lost_in=received.loss, lost_out=sent.loss,
            num_reports=sent.updateCount, reported_out=sent.pkt * _share_before(sent.update, stream.rtcp.start),
            level_in=self._loudest,
        )  # fmt: skip
        self._sink(self, health_of(
            self.leg_id, counts, codec=self._codec(), is_held=self.media.is_held or self._is_silenced,
            promised_address=self.getStreamInfo(0).remoteRtpAddress, source_address=transport.srcRtpName,
        ))  # fmt: skip

    def _codec(self) -> str:
        if not self._has_media:
            return ""
        stream = self.getStreamInfo(0)
        return f"{stream.codecName}/{stream.codecClockRate}"

    def _received_packets(self) -> int:
        try:
            statistics = self.getStreamStat(0)  # named for the same reason as `info` above
        except pj.Error:  # the stream is being set up or torn down
            return self._rtp_packets
        return int(statistics.rtcp.rxStat.pkt)

    def _disconnected(self, sip_status: int, was_confirmed: bool) -> LegDisconnected:
        if self._cause is not None:
            by = "network" if self._cause is Cause.MEDIA_TIMEOUT else "agent"
            return LegDisconnected(leg_id=self.leg_id, cause=self._cause, sip_status=sip_status, by=by)
        if was_confirmed and sip_status < 300:
            return LegDisconnected(leg_id=self.leg_id, cause=Cause.NORMAL, sip_status=sip_status, by="caller")
        by = (
            "network"
            if sip_status in _NETWORK_STATUSES and (was_confirmed or self.direction == "outbound")
            else "caller"
        )
        cause = Cause.NETWORK_ERROR if was_confirmed and by == "network" else cause_of_status(sip_status)
        return LegDisconnected(leg_id=self.leg_id, cause=cause, sip_status=sip_status, by=by)


def _call_param(sip_status: int) -> pj.CallOpParam:
    param = pj.CallOpParam(True)
    param.statusCode = sip_status
    param.opt.audioCount, param.opt.videoCount = 1, 0
    return param


def _share_before(moment: pj.TimeVal, start: pj.TimeVal) -> float:
    """Which share of the time since `start` had passed at `moment`, 0-1: a stream sends packets all the time."""
    since_s = moment.sec - start.sec + (moment.msec - start.msec) / 1000
    now_s = time.time() - start.sec - start.msec / 1000
    return min(max(since_s / now_s, 0.0), 1.0) if now_s > 0 else 0.0
