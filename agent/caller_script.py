"""What our own synthetic caller does in a call: a list of steps, and the state machine that walks through it.

No socket, no clock: events of the caller's own leg in, actions out; time is the leg's sample counter. So a script runs
the same against a SIP call and against a loopback leg in virtual time. Seen from the caller, the far end is "the
agent": the leg's `caller_onset` is where the agent became audible to us.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from telephony.leg import AudioFrame, LegDisconnected, LegEvent, LegState, LegStateChanged, PlayoutProgress, WireMetric


@dataclass(frozen=True)
class Wait:
    """Do nothing for `ms`."""

    ms: int


@dataclass(frozen=True)
class WaitForAgent:
    """Until the agent has spoken (since our last word) and been silent for `silent_ms`; at most `timeout_ms`."""

    silent_ms: int = 900
    timeout_ms: int = 15000


@dataclass(frozen=True)
class Say:
    """Play a clip to its end. `pcm` is int16 mono at the leg's rate."""

    pcm: bytes = field(repr=False)
    label: str = ""


@dataclass(frozen=True)
class BargeIn:
    """Say a clip `after_ms` of the agent's speech: counted from its onset, of the stretch it is in or the next one."""

    pcm: bytes = field(repr=False)
    after_ms: int = 800
    label: str = ""
    timeout_ms: int = 15000


@dataclass(frozen=True)
class Dtmf:
    digits: str


@dataclass(frozen=True)
class Hangup:
    """BYE."""


Step = Wait | WaitForAgent | Say | BargeIn | Dtmf | Hangup
Action = Say | Dtmf | Hangup


@dataclass(frozen=True)
class CallerScript:
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Segment:
    """A voiced stretch, in samples of the caller's leg."""

    onset_sample: int
    offset_sample: int


@dataclass
class Said:
    """One clip as it really left."""

    step: int
    label: str
    start_sample: int
    end_sample: int = -1


class ScriptPlayer:
    """Walks one script through one call; owned by whoever feeds it. Ends with `is_over`."""

    def __init__(self, script: CallerScript, sample_rate_hz: int = 8000) -> None:
        self._steps = script.steps
        self._rate = sample_rate_hz
        self.step_index = 0
        self._step_began = 0
        self.sample = 0
        self.agent_segments: list[Segment] = []
        self.own_segments: list[Segment] = []
        self.said: list[Said] = []
        self.timed_out_steps: list[int] = []
        self._agent_onset: int | None = None  # of the stretch the agent is in
        self._own_onset: int | None = None
        self._heard_from = 0  # agent speech from here on answers our last word
        self._is_saying = False
        self._is_confirmed = False

    @property
    def is_over(self) -> bool:
        return self.step_index >= len(self._steps)

    @property
    def say_item(self) -> str:
        """Play-out item of the clip of the present step."""
        return f"step-{self.step_index}"

    def on_event(self, event: LegEvent) -> list[Action]:
        """What to do now, in order."""
        match event:
            case LegStateChanged(state=LegState.CONFIRMED):
                self._is_confirmed = True
            case AudioFrame(start_sample=start_sample, pcm=pcm):
                self.sample = start_sample + len(pcm) // 2
            case WireMetric(kind=kind, sample=sample):
                self._on_metric(kind, sample)
            case PlayoutProgress(item_id=item_id, is_finished=True) if item_id == self.say_item:
                self.said[-1].end_sample = self.sample
                self._heard_from = self.sample
                self._next()
            case LegDisconnected():
                self._close_segments()
                self.step_index = len(self._steps)
        actions: list[Action] = []
        while self._is_confirmed and not self.is_over and not self._is_saying:
            action = self._try_step(self._steps[self.step_index])
            if action is None:
                break
            actions += action
        return actions

    # ------------------------------------------------------------------ private

    def _try_step(self, step: Step) -> list[Action] | None:
        """Actions when the step is done (or began to speak), None while it waits."""
        waited = self.sample - self._step_began
        match step:
            case Wait(ms=ms):
                return self._done() if waited >= self._samples(ms) else None
            case WaitForAgent(silent_ms=silent_ms, timeout_ms=timeout_ms):
                if self._agent_was_silent_for(self._samples(silent_ms)):
                    return self._done()
                return self._timed_out() if waited >= self._samples(timeout_ms) else None
            case Say():
                return self._say(step)
            case BargeIn(pcm=pcm, after_ms=after_ms, label=label, timeout_ms=timeout_ms):
                if self._agent_onset is not None and self.sample - self._agent_onset >= self._samples(after_ms):
                    return self._say(Say(pcm, label))
                return self._timed_out() if waited >= self._samples(timeout_ms) else None
            case Dtmf() | Hangup():
                self._heard_from = self.sample  # keys are our word, too: the agent's answer comes after them
                self._next()
                return [step]

    def _say(self, step: Say) -> list[Action]:
        self._is_saying = True
        self.said.append(Said(self.step_index, step.label, self.sample))
        return [step]

    def _done(self) -> list[Action]:
        self._next()
        return []

    def _timed_out(self) -> list[Action]:
        self.timed_out_steps.append(self.step_index)
        return self._done()

    def _next(self) -> None:
        self._is_saying = False
        self.step_index += 1
        self._step_began = self.sample

    def _agent_was_silent_for(self, num_samples: int) -> bool:
        if self._agent_onset is not None or not self.agent_segments:
            return False
        last = self.agent_segments[-1].offset_sample
        return last > self._heard_from and self.sample - last >= num_samples

    def _on_metric(self, kind: str, sample: int) -> None:
        match kind:
            case "caller_onset":
                self._agent_onset = sample
            case "caller_offset" if self._agent_onset is not None:
                self.agent_segments.append(Segment(self._agent_onset, sample))
                self._agent_onset = None
            case "agent_onset":
                self._own_onset = sample
            case "agent_offset" if self._own_onset is not None:
                self.own_segments.append(Segment(self._own_onset, sample))
                self._own_onset = None

    def _close_segments(self) -> None:
        if self._agent_onset is not None:
            self._on_metric("caller_offset", self.sample)
        if self._own_onset is not None:
            self._on_metric("agent_offset", self.sample)

    def _samples(self, ms: int) -> int:
        return ms * self._rate // 1000
