"""Many calls in real time on one engine: how soon a reply sounds, and how many calls the device holds.

Every call goes round and round: the caller speaks (two seconds of noise that counts as voiced), the agent takes the
floor, its reply is heard to the end, and both are silent until the next round; the reply's length and the pause make
the agent speak 45 % of the time. First audio is the wall time from StartReply to the first AudioDelta, with everything
in it: the rest of the caller's speech, prefill, five text tokens, voice tokens, flow, vocoder. A reply whose audio ran
out before the next piece was there counts as a gap. "Held" is p95 of first audio within 300 ms and no gap in 99 % of
the replies. Knows nothing of what is said.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from minmo_runtime.api import (
    INPUT_SAMPLE_RATE_HZ,
    AudioDelta,
    CloseStream,
    OpenStream,
    PushAudio,
    PushText,
    ReplyFinished,
    RuntimeEvent,
    StartReply,
    StreamFailed,
    ToolCallRequested,
    ToolResult,
)
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.engine import Engine
from minmo_runtime.weights import Checkpoint

SPEAKING_SHARE = 0.45
HELD_P95_MS = 300.0
REPLY_S = 3.0
CALLER_S = 2.0
_PACKET_S = 0.08
SYSTEM = "you are mia at the garden shop. speak in a friendly voice at a normal pace. order numbers have 5 digits."
QUESTION = "where is my order 45612"


@dataclass
class Caller:
    """One call's round. Times are those of the bench's clock."""

    call_id: str
    next_round_s: float
    asked_s: float = -1.0  # StartReply was sent
    is_sounding: bool = False
    heard_until_s: float = 0.0  # what was sent so far lasts until then
    num_rounds: int = 0
    pushed_samples: int = 0
    voiced_s: float = 0.0
    has_gap: bool = False


@dataclass
class Result:
    num_calls: int
    first_audio_ms: list[float] = field(default_factory=list)
    num_replies: int = 0
    num_gaps: int = 0
    num_failed: int = 0
    bytes_per_call: int = 0

    def percentile(self, share: float) -> float:
        """NaN where nothing was said in time."""
        return float(np.percentile(self.first_audio_ms, share)) if self.first_audio_ms else float("nan")

    @property
    def is_held(self) -> bool:
        return self.percentile(95) <= HELD_P95_MS and self.num_gaps <= 0.01 * self.num_replies and not self.num_failed

    def row(self) -> dict[str, float | int | bool | None]:
        """For JSON: None where nothing was said in time."""
        has_any = bool(self.first_audio_ms)
        return {
            "calls": self.num_calls,
            "replies": len(self.first_audio_ms),
            "p50_ms": round(self.percentile(50), 1) if has_any else None,
            "p95_ms": round(self.percentile(95), 1) if has_any else None,
            "gaps": self.num_gaps,
            "failed": self.num_failed,
            "mb_per_call": round(self.bytes_per_call / 1e6, 1),
            "held": self.is_held,
        }


def engine_config(checkpoint: Checkpoint, num_calls: int, device: str, dtype: str) -> RuntimeConfig:
    """Replies of about three seconds, whatever random weights say."""
    rates = checkpoint.rates
    voice_tokens = round(REPLY_S / rates.voice_token_s)
    is_gpu = device == "cuda"
    return RuntimeConfig(
        max_streams=num_calls,
        max_context_tokens=1024,
        max_reply_tokens=max(8, round(voice_tokens * rates.text_per_block / rates.voice_per_block)),
        max_voice_tokens=max(50, voice_tokens),
        prefill_chunk_tokens=1024 if is_gpu else 48,
        sound_rows=num_calls if is_gpu else 1,
        has_fixed_shapes=is_gpu,
        device=device,
        dtype=dtype,
    )


class Bench:
    """`clock` is real time; a test may pass one that jumps."""

    def __init__(
        self, checkpoint: Checkpoint, config: RuntimeConfig, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.engine = Engine(checkpoint, config)
        self.clock = clock
        self.hears = self.engine.runner.chunk_fbank_frames > 0
        self.noise = (np.random.default_rng(0).normal(0, 2000, INPUT_SAMPLE_RATE_HZ)).astype("<i2")
        self.callers: dict[str, Caller] = {}
        self.result = Result(config.max_streams)

    def run(self, seconds: float, warm_s: float) -> Result:
        """Figures of the rounds that begin after `warm_s`."""
        period = REPLY_S / SPEAKING_SHARE
        begin = self.clock()
        num = self.engine.config.max_streams
        for index in range(num):
            call_id = f"c{index}"
            self.engine.receive(OpenStream(call_id=call_id, system_prompt=SYSTEM, seed=index), begin)
            self.callers[call_id] = Caller(call_id, begin + period * index / num)
        while (now := self.clock()) - begin < seconds:
            for caller in self.callers.values():
                self._advance(caller, now, period, is_measured=now - begin >= warm_s)
            self._take(self.engine.step(now), warm_s + begin)
            if not self.engine.has_work(self.clock()):
                time.sleep(0.0005)
        self.result.bytes_per_call = self._bytes() // max(1, num)
        for call_id in list(self.engine.streams):
            self.engine.receive(CloseStream(call_id=call_id), self.clock())
        return self.result

    def _advance(self, caller: Caller, now: float, period: float, is_measured: bool) -> None:
        if caller.call_id not in self.engine.streams or caller.asked_s >= 0 or now < caller.next_round_s:
            return
        send = self.engine.receive
        if self.hears and caller.voiced_s < CALLER_S:
            if now >= caller.next_round_s + caller.voiced_s:
                self._push(caller, now)
            return
        if not self.hears:
            send(PushText(call_id=caller.call_id, text=QUESTION), now)
        caller.num_rounds += 1
        send(StartReply(call_id=caller.call_id, turn_id=str(caller.num_rounds)), now)
        caller.asked_s = now
        caller.next_round_s = max(caller.next_round_s + period, now)
        caller.is_sounding = caller.has_gap = False
        caller.voiced_s = 0.0
        self.result.num_replies += is_measured

    def _push(self, caller: Caller, now: float) -> None:
        count = round(_PACKET_S * INPUT_SAMPLE_RATE_HZ)
        pcm = self.noise[:count].tobytes()
        start = caller.pushed_samples
        self.engine.receive(PushAudio(call_id=caller.call_id, pcm=pcm, start_sample=start, voiced=True), now)
        caller.pushed_samples += count
        caller.voiced_s += _PACKET_S

    def _take(self, events: list[RuntimeEvent], measured_from_s: float) -> None:
        now = self.clock()
        rate = self.engine.checkpoint.rates.output_sample_rate_hz
        for event in events:
            caller = self.callers[event.call_id]
            is_measured = caller.asked_s >= measured_from_s
            match event:
                case AudioDelta():
                    if not caller.is_sounding:
                        caller.is_sounding = True
                        caller.heard_until_s = now
                        if is_measured:
                            self.result.first_audio_ms.append(1000 * (now - caller.asked_s))
                    elif now > caller.heard_until_s and not caller.has_gap:
                        caller.has_gap = True
                        self.result.num_gaps += is_measured
                    caller.heard_until_s = max(caller.heard_until_s, now) + len(event.pcm) / 2 / rate
                case ToolCallRequested():
                    answer = ToolResult(
                        call_id=event.call_id, turn_id=event.turn_id, tool_call_id=event.tool_call_id, content="shipped"
                    )
                    self.engine.receive(answer, now)
                case ReplyFinished():
                    caller.asked_s = -1.0
                case StreamFailed():
                    self.result.num_failed += 1

    def _bytes(self) -> int:
        """What the calls hold: caches, not weights."""
        return self.engine.runner.num_cache_bytes


def measure_calls(
    checkpoint: Checkpoint, calls: list[int], device: str, dtype: str, seconds: float, warm_s: float
) -> list[Result]:
    """One engine after the other; stops behind the first number of calls that is far from held."""
    results = []
    for num_calls in calls:
        bench = Bench(checkpoint, engine_config(checkpoint, num_calls, device, dtype))
        results.append(bench.run(seconds, warm_s))
        del bench
        if device == "cuda":
            torch.cuda.empty_cache()
        if results[-1].percentile(50) > 10 * HELD_P95_MS:
            break
    return results


def table(results: list[Result]) -> str:
    lines = [f"{'calls':>6}{'replies':>9}{'p50 ms':>10}{'p95 ms':>10}{'gaps':>6}{'failed':>8}{'MB/call':>9}  held"]
    for result in results:
        row = result.row()
        lines.append(
            f"{row['calls']:>6}{row['replies']:>9}{row['p50_ms'] or '-':>10}{row['p95_ms'] or '-':>10}{row['gaps']:>6}"
            f"{row['failed']:>8}{row['mb_per_call']:>9}  {'yes' if row['held'] else 'no'}"
        )
    held = [result.num_calls for result in results if result.is_held]
    most = max(held, default=0)
    lines.append(f"held at p95 first audio <= {HELD_P95_MS:g} ms, {SPEAKING_SHARE:.0%} speaking: {most} calls")
    return "\n".join(lines)
