"""Whole calls without wire and without waiting: the call's core, a loopback leg and the real engine on one virtual
clock.

For the evaluation: what was understood and done, as on the wire, at the speed of the computer. The engine's jobs cost
no virtual time here, so latencies of the model are not measured in the lab (those come from SIP calls); what the turn
taking does with overlaps is. The caller is a `CallerScript`, the same one that walks through a SIP call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agent.call import Call
from agent.call_setup import CallSetup
from agent.caller_script import CallerScript, Dtmf, Hangup, Say, ScriptPlayer
from agent.events import CallEvent, CommitTool, EndCall, Keep, RunTool, Start, Tick, ToolFinished
from minmo_runtime import api
from minmo_runtime.engine import Engine
from telephony import leg as tel
from telephony.config import TelephonyConfig
from telephony.loopback import LoopbackLeg
from telephony.resample import StreamResampler
from telephony.voice_activity import VoiceActivity

TICK_S = 0.02
MAX_JOBS_PER_TICK = 2_000  # a reply that goes on for ever must not stop the clock
_MIRRORED = {"caller_onset": "agent_onset", "caller_offset": "agent_offset",
             "agent_onset": "caller_onset", "agent_offset": "caller_offset"}  # fmt: skip


@dataclass
class LabCall:
    """One call; `run` returns when it is over. Then look at `kept` and `player`."""

    engine: Engine
    setup: CallSetup
    script: CallerScript
    check: Callable[[RunTool], ToolFinished]
    now: float = 0.0
    kept: list[Keep] = field(default_factory=list)
    committed: list[CommitTool] = field(default_factory=list)
    is_over: bool = False

    def __post_init__(self) -> None:
        self.call = Call(self.setup)
        self.leg = LoopbackLeg(self.setup.leg_id)
        self.player = ScriptPlayer(self.script, self.setup.sample_rate_hz)
        self._say_ends: int | None = None
        self._inbox: deque[CallEvent] = deque([Start()])

    def run(self, max_s: float = 120.0) -> LabCall:
        self.leg.ring()
        while not self.is_over and self.now < max_s:
            self._tick()
        if not self.is_over:
            self.leg.hang_up()
            self._tick()
        self.engine.receive(api.CloseStream(call_id=self.setup.call_id), self.now)
        return self

    def _tick(self) -> None:
        self.now += TICK_S
        self.leg.advance(round(TICK_S * self.setup.sample_rate_hz))
        for event in self.leg.drain():
            self._inbox.append(event)
            self._play_caller(event)
        self._inbox.append(Tick())
        self._settle()
        for _ in range(MAX_JOBS_PER_TICK):
            if not self.engine.has_work(self.now):
                break
            self._inbox += self.engine.step(self.now)
            self._settle()

    def _settle(self) -> None:
        while self._inbox:
            for action in self.call.step(self._inbox.popleft(), self.now):
                self._carry_out(action)

    def _carry_out(self, action: Any) -> None:
        match action:
            case Keep():
                self.kept.append(action)
            case RunTool():
                self._inbox.append(self.check(action))
            case CommitTool():
                self.committed.append(action)
            case EndCall():
                self.is_over = True
            case _ if isinstance(action, api.Message):
                self._inbox += self.engine.receive(action, self.now)  # type: ignore[arg-type]
            case _ if isinstance(action, tel.Message):
                if self.leg.state is not tel.LegState.DISCONNECTED:
                    self.leg.send_now(action)  # type: ignore[arg-type]

    # ------------------------------------------------------------------- the caller

    def _play_caller(self, event: tel.LegEvent) -> None:
        """The caller sees the same wire from the other end."""
        if isinstance(event, tel.WireMetric):
            if event.kind not in _MIRRORED:
                return
            event = tel.WireMetric(leg_id=event.leg_id, kind=_MIRRORED[event.kind], sample=event.sample)
        elif isinstance(event, tel.PlayoutProgress | tel.Flushed):
            return  # the agent's play-out, not ours
        self._act(self.player.on_event(event))
        if self._say_ends is not None and self.player.sample >= self._say_ends:
            self._say_ends = None
            item = self.player.say_item
            done = tel.PlayoutProgress(leg_id=self.setup.leg_id, item_id=item, played_samples=0, is_finished=True)
            self._act(self.player.on_event(done))

    def _act(self, actions: list[Say | Dtmf | Hangup]) -> None:
        for action in actions:
            match action:
                case Say(pcm=pcm):
                    self.leg.speak(pcm)
                    self._say_ends = self.player.sample + len(pcm) // 2
                case Dtmf(digits=digits):
                    self.leg.press(digits)
                case Hangup():
                    self.leg.hang_up()

    # ---------------------------------------------------------------------- looking

    def keeps(self, method: str, **wanted: Any) -> list[dict[str, Any]]:
        found = [keep.arguments for keep in self.kept if keep.method == method]
        return [a for a in found if all(a.get(key) == value for key, value in wanted.items())]

    @property
    def turns(self) -> list[dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        for keep in self.kept:
            if keep.method in ("append_turn", "update_turn"):
                rows.setdefault(keep.arguments["turn_id"], {}).update(keep.arguments)
        return list(rows.values())


def hear(engine: Engine, pcm: bytes, rate_hz: int, call_id: str = "hear") -> str:
    """What the encoder makes of a clip (int16 mono), gated and chunked as in a call."""
    block = rate_hz // 50
    padded = bytes(rate_hz) + pcm + bytes(2 * 2 * rate_hz)
    resampler, activity = StreamResampler(rate_hz, api.INPUT_SAMPLE_RATE_HZ), VoiceActivity(TelephonyConfig())
    segments: dict[int, str] = {}
    now, position = 0.0, 0
    engine.receive(api.OpenStream(call_id=call_id, system_prompt=""), now)
    for start in range(0, len(padded), 2 * block):
        piece = padded[start : start + 2 * block]
        wide = resampler.push(piece)
        request = api.PushAudio(call_id=call_id, pcm=wide, start_sample=position, voiced=activity.push(piece))
        position += len(wide) // 2
        now += TICK_S
        events = engine.receive(request, now)
        while engine.has_work(now):
            events += engine.step(now)
        for event in events:
            if isinstance(event, api.Caption) and event.call_id == call_id:
                segments[event.start_sample] = event.text
    engine.receive(api.CloseStream(call_id=call_id), now)
    return " ".join(segments[at] for at in sorted(segments) if segments[at])
