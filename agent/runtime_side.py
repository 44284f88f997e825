"""The call's stream in the engine of the moment: opened, lost, opened again; what may be asked of it, and when.

While the leg has not said at which sample a cut turn ended, everything asked of the runtime waits behind the
`CancelReply` that will say so. Without a runtime nothing waits: the next stream starts from the transcript, and a
reply that was wanted meanwhile is owed. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.call_context import CallContext
from agent.call_setup import CallSetup
from agent.events import ReopenRuntime
from minmo_runtime import api
from telephony.resample import StreamResampler

History = tuple[tuple[str, str], ...]


@dataclass
class RuntimeSide:
    context: CallContext
    seed: int
    slot_digits: int
    output_rate_hz: int
    to_16k: StreamResampler
    earlier: History = ()  # said to an agent process that died
    is_up: bool = False
    was_opened: bool = False
    owed_text: str = ""  # what the caller said to an engine that died before it answered
    waiting_reply: str = ""  # the turn that will answer it as soon as there is an engine
    must_apologise: bool = False  # it died in the middle of an answer
    is_held: bool = False
    _held: list[api.RuntimeRequest] = field(default_factory=list)

    @classmethod
    def of(cls, setup: CallSetup, context: CallContext) -> RuntimeSide:
        to_16k = StreamResampler(setup.sample_rate_hz, api.INPUT_SAMPLE_RATE_HZ)
        return cls(context, setup.seed, setup.order_digits, setup.rendered_rate_hz, to_16k)

    # ------------------------------------------------------------------ its life

    def open(self, system_prompt: str, history: History = ()) -> None:
        self.context.add(
            api.OpenStream(
                call_id=self.context.call_id,
                system_prompt=system_prompt,
                seed=self.seed,
                history=self.earlier + history,
                slot_digits=self.slot_digits,
            )
        )

    def opened(self, event: api.StreamOpened) -> bool:
        """True for the first stream of this call."""
        is_first, self.was_opened = not self.was_opened, True
        self.is_up = True
        self.output_rate_hz = event.output_sample_rate_hz
        self.context.keep("update_call", checkpoint=event.checkpoint, bridges=list(event.bridges))
        if event.memory_bytes:
            held = {"turn_id": "", "name": "engine_memory_kib", "value": event.memory_bytes / 1024}
            self.context.keep("add_metric", **held, source="runtime")
        return is_first

    def lost(self, reason: str) -> None:
        self.is_up = False
        self._held = []
        self.context.keep("add_defect", kind="engine_lost", detail=reason)
        self.context.add(ReopenRuntime())

    def close(self) -> None:
        """Also one that is not up yet: the engine may have opened it a moment ago."""
        self.context.add(api.CloseStream(call_id=self.context.call_id))

    # ------------------------------------------------------------------ requests

    def ask(self, request: api.RuntimeRequest) -> None:
        """In order; dropped without a runtime."""
        if not self.is_up:
            return
        if self.is_held:
            self._held.append(request)
        else:
            self.context.add(request)

    def push(self, pcm: bytes, *, is_voiced: bool) -> None:
        """The caller's audio at the leg's rate; it never waits."""
        pcm_16k = self.to_16k.push(pcm)
        if self.is_up and pcm_16k:
            start = self.context.pushed_16k
            request = api.PushAudio(call_id=self.context.call_id, pcm=pcm_16k, start_sample=start, voiced=is_voiced)
            self.context.add(request)
        self.context.pushed_16k += len(pcm_16k) // 2

    def cancel(self, turn_id: str, *, played_samples: int, reason: str) -> None:
        """It is what the others wait for, so it waits for nothing."""
        call_id = self.context.call_id
        self.context.add(
            api.CancelReply(call_id=call_id, turn_id=turn_id, played_samples=played_samples, reason=reason)
        )

    def release(self) -> None:
        """Every cut has its exact sample: what waited follows."""
        self.is_held = False
        self.context.add(*self._held)
        self._held = []

    def start_reply(self, turn_id: str, text: str, heard: str) -> None:
        """`text`: the caller's turn where the runtime has not heard it by itself; `heard`: where it has."""
        if not self.is_up:
            self.owed_text = text or heard
            self.waiting_reply = turn_id
            return
        self.owed_text = self.waiting_reply = ""
        if text:
            self.ask(api.PushText(call_id=self.context.call_id, text=text))
        self.ask(api.StartReply(call_id=self.context.call_id, turn_id=turn_id))
