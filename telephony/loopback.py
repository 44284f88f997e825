"""A leg in memory, driven in virtual time: the same contract as a call over SIP, without network, thread or clock.

Maintained product code: scenario tests, the lab and replay talk to the agent through it. The far end (the caller) is
played by the methods `ring speak press hang_up cancel hold`; between two `advance` calls no sample passes. Agent audio
goes through the same play-out, resampler, echo gate, voice activity and wire metrics as on the wire.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import numpy as np

from telephony.answer_detection import AnswerDetector
from telephony.config import TelephonyConfig
from telephony.frames import CallerAudio, Tap, audio_frame
from telephony.leg import (
    Answer,
    DtmfReceived,
    Flush,
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
    Referred,
    ReferResult,
    Reject,
    SendDtmf,
    StopAnswerDetection,
    Unhold,
    WireMetric,
)  # fmt: skip
from telephony.outgoing import OutgoingAudio
from telephony.playout import Playout
from telephony.sip.causes import Cause, cause_of_hangup, cause_of_status
from telephony.states import check_legal, is_playout
from telephony.wire_metrics import VoicedEnergyMeter


class LoopbackLeg:
    """One call whose far end is the test. `echo_gain` > 0 sends our voice back, `echo_delay_ms` later. `direction`
    outbound: we call, and the leg listens for who answers."""

    is_resumed = False
    can_transfer = True

    def __init__(
        self, leg_id: str, did: str = "100", ani: str = "anonymous", display_name: str = "",
        config: TelephonyConfig | None = None, echo_gain: float = 0.0, echo_delay_ms: int = 40,
        direction: str = "inbound",
    ) -> None:  # fmt: skip
        self.leg_id, self.did, self.ani, self.display_name = leg_id, did, ani, display_name
        self.config = config or TelephonyConfig()
        self.direction = direction
        self.sample_rate_hz = self.config.sample_rate_hz
        self.state = LegState.NULL
        # What the far end says to a REFER; None: it accepts, and says no more.
        self.refer_answer: ReferResult | None = ReferResult(leg_id=leg_id, sip_status=200, reason="OK")
        self.referred_to: str | None = None
        self.rejected_with: Reject | None = None
        self.keys_heard = ""  # that we have sent
        self.played_before: dict[str, int] = {}
        self._playout = Playout(leg_id, self.config)
        self._outgoing = OutgoingAudio(self.sample_rate_hz)
        self._caller_audio = CallerAudio(self.config)
        self._answer: AnswerDetector | None = None
        if direction == "outbound":
            self._answer = AnswerDetector(leg_id, self.sample_rate_hz, self.config.vad_hangover_ms)
        self._tap: Tap | None = None
        self._meters = {party: VoicedEnergyMeter(leg_id, party, self.config) for party in ("caller", "agent")}
        self._commands: deque[LegCommand] = deque()
        self._speech, self._heard = bytearray(), bytearray()
        self._echo_gain = echo_gain
        self._echo_line = bytearray(2 * echo_delay_ms * self.sample_rate_hz // 1000)
        self._is_held = False
        self.has_early_media = True  # does the far end listen before the answer?
        self._is_early = self._is_answer_told = False
        self._owed_samples = 0  # asked for by `advance`, less than a frame
        self._events: deque[LegEvent] = deque()
        self._has_events = asyncio.Event()

    # ------------------------------------------------------------- Leg contract

    async def send(self, command: LegCommand) -> None:
        self.send_now(command)

    def send_now(self, command: LegCommand) -> None:
        """`send` for callers without an event loop. Signalling acts at once, play-out commands on the next sample."""
        check_legal(command, self.state)
        if is_playout(command):
            if isinstance(command, Play):
                command = self._outgoing.at_leg_rate(command)
                waiting = sum(len(queued.pcm) // 2 for queued in self._commands if isinstance(queued, Play))
                self._playout.check_room(command.item_id, waiting + len(command.pcm) // 2)
            elif isinstance(command, Flush):
                self._outgoing.forget(command.item_id)
            self._commands.append(command)
            return
        match command:
            case Answer():
                self._enter(LegState.CONNECTING)
                self._enter(LegState.CONFIRMED)
            case Progress():
                self._is_early = self.has_early_media
                self._enter(LegState.EARLY)
            case Reject(sip_status=sip_status):
                self.rejected_with = command
                self._end(cause_of_status(sip_status), sip_status, "agent")
            case Hangup(cause=cause) if self.state is not LegState.DISCONNECTED:
                self._end(cause_of_hangup(cause), 200 if self.state is LegState.CONFIRMED else 603, "agent")
            case SendDtmf(digits=digits):
                self.keys_heard += digits
            case StopAnswerDetection():
                self._answer = None
            case Hold() | Unhold():
                self._set_held(isinstance(command, Hold), "agent")
            case Refer(refer_to=refer_to):
                self.referred_to = refer_to
                if self.refer_answer is not None:
                    self._emit(self.refer_answer)

    async def events(self) -> AsyncIterator[LegEvent]:
        while True:
            while self._events:
                event = self._events.popleft()
                yield event
                if isinstance(event, LegDisconnected):
                    return
            self._has_events.clear()
            await self._has_events.wait()

    def set_tap(self, tap: Tap | None) -> None:
        self._tap = tap

    # ------------------------------------------------------------- the far end

    def ring(self, headers: dict[str, str] | None = None, trunk: str = "", is_asserted: bool = False) -> None:
        """The INVITE arrives, by `trunk`; `is_asserted`: which is trusted, and vouches for the number."""
        assert self.state is LegState.NULL, self.state
        self.state = LegState.INCOMING
        incoming = LegIncoming(
            leg_id=self.leg_id, did=self.did, ani=self.ani, display_name=self.display_name,
            source_address="127.0.0.1:5060", headers=headers or {}, sample_rate_hz=self.sample_rate_hz,
            trunk=trunk, asserted_identity=self.ani if is_asserted else "",
        )  # fmt: skip
        self._emit(incoming)
        self._emit(LegStateChanged(leg_id=self.leg_id, state=LegState.INCOMING))

    def pick_up(self) -> None:
        """The callee answers our INVITE."""
        assert (self.direction, self.state) == ("outbound", LegState.NULL), (self.direction, self.state)
        self._enter(LegState.CALLING)
        self._enter(LegState.CONFIRMED)

    def speak(self, pcm: bytes) -> None:
        """Queue caller audio (leg rate); silence follows it."""
        self._speech += pcm

    def press(self, digits: str) -> None:
        for digit in digits:
            self._emit(DtmfReceived(leg_id=self.leg_id, digit=digit, sample=self.sample))

    def hold(self, is_held: bool = True) -> None:
        """Re-INVITE sendonly, or back: the clock runs on, nobody hears us."""
        self._set_held(is_held, "caller")

    def send_us_to(self, target: str, sip_status: int = 200) -> None:
        """An inbound REFER that the trunk allows: from now on it is `target` that hears us, or has refused."""
        self._emit(Referred(leg_id=self.leg_id, target=target))
        self._emit(Referred(leg_id=self.leg_id, target=target, sip_status=sip_status))

    def hang_up(self) -> None:
        if self.referred_to is not None and self.refer_answer is None:
            self._emit(ReferResult(leg_id=self.leg_id, sip_status=0, reason="the party left"))
        self._end(Cause.NORMAL, 200, "caller")

    def cancel(self) -> None:
        self._end(Cause.CANCELLED, 487, "caller")

    def lose_network(self) -> None:
        self._end(Cause.MEDIA_TIMEOUT, 408, "network")

    @property
    def heard(self) -> bytes:
        """Everything that was sent to the caller since CONFIRMED, silence included."""
        return bytes(self._heard)

    # ------------------------------------------------------------------- time

    @property
    def sample(self) -> int:
        """The leg's clock."""
        return self._playout.sample

    def advance(self, num_samples: int) -> None:
        """Let `num_samples` pass, in whole frames; what is left over counts towards the next call."""
        if not self._is_running:
            return
        self._owed_samples += num_samples
        while self._owed_samples >= self.config.samples_per_frame and self._is_running:
            self._owed_samples -= self.config.samples_per_frame
            self._tick(self.config.samples_per_frame)

    @property
    def _is_running(self) -> bool:
        return self.state is LegState.CONFIRMED or (self.state is LegState.EARLY and self._is_early)

    def drain(self) -> list[LegEvent]:
        """All events not yet taken, for tests without an event loop."""
        events = list(self._events)
        self._events.clear()
        return events

    # ---------------------------------------------------------------- private

    def _set_held(self, is_held: bool, by: str) -> None:
        self._is_held = is_held
        self._emit(HoldChanged(leg_id=self.leg_id, is_held=is_held, by=by))

    def _tick(self, num_samples: int) -> None:
        while self._commands:
            for flushed in self._playout.apply(self._commands.popleft()):
                self._emit(flushed)
        start_sample = self.sample
        if self.state is LegState.CONFIRMED and not self._is_answer_told:
            self._is_answer_told = True
            self._caller_audio.answered(self.leg_id)
            self._emit(WireMetric(leg_id=self.leg_id, kind="answered", sample=start_sample))
        sent, events = self._playout.pull(num_samples, self._is_held)
        self._heard += sent
        received = self._received(num_samples, sent)
        events += self._meters["agent"].push(sent) + self._meters["caller"].push(received)
        for event in events:
            self._emit(event)
        if self._tap is not None:
            self._tap(start_sample, received, sent)
        cleaned, is_voiced = self._caller_audio.listen(received, sent)
        self._playout.caller_is_voiced(is_voiced)
        if self._answer is not None:
            for evidence in self._answer.push(received, is_voiced):
                self._emit(evidence)
        measured = self._caller_audio.take_measured()
        if measured is not None:
            self._emit(measured)
        self._emit(audio_frame(self.leg_id, self.sample_rate_hz, start_sample, cleaned, is_voiced))

    def _received(self, num_samples: int, sent: bytes) -> bytes:
        size = 2 * num_samples
        speech = bytes(self._speech[:size])
        del self._speech[:size]
        speech += bytes(size - len(speech))
        if not self._echo_gain:
            return speech
        self._echo_line += sent
        echo = np.frombuffer(bytes(self._echo_line[:size]), "<i2") * self._echo_gain
        del self._echo_line[:size]
        mixed = np.rint(np.frombuffer(speech, "<i2") + echo)
        return np.clip(mixed, -32768, 32767).astype("<i2").tobytes()

    def _enter(self, state: LegState) -> None:
        self.state = state
        codec = self.config.codecs[0] if state is LegState.CONFIRMED else ""
        self._emit(LegStateChanged(leg_id=self.leg_id, state=state, sample=self.sample, codec=codec))

    def _end(self, cause: Cause, sip_status: int, by: str) -> None:
        if self.state is LegState.DISCONNECTED:
            return
        self._enter(LegState.DISCONNECTED)
        for progress in self._playout.final_progress():
            self._emit(progress)
        self._emit(LegDisconnected(leg_id=self.leg_id, cause=cause, sip_status=sip_status, by=by))

    def _emit(self, event: LegEvent) -> None:
        self._events.append(event)
        self._has_events.set()
