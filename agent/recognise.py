"""What our own encoder hears in a piece of audio: pushed through a runtime stream like a caller, captions collected.

Used to ask of the agent's own recorded voice: is it intelligible? (The demo, the evaluation.) No model is loaded here.
"""

from __future__ import annotations

import asyncio

from minmo_runtime import api
from minmo_runtime.text import normalise_spoken
from telephony.config import TelephonyConfig
from telephony.resample import StreamResampler
from telephony.voice_activity import VoiceActivity

_BLOCK_MS = 20
_BLOCKS_AT_ONCE = 25  # 0.5 s, then let the engine work: it must not have to drop unheard input
_MAX_BACKLOG_S = 8.0
_QUIET_AFTER_S = 3.0  # no caption for so long, and nothing left to push: that was all


async def recognise(runtime: api.Runtime, pcm: bytes, rate_hz: int, call_id: str = "recognise") -> str:
    """All words of `pcm` (int16 mono), in order. Raises what the runtime raises."""
    await runtime.send(api.OpenStream(call_id=call_id, system_prompt=""))
    heard = _Heard()
    listening = asyncio.create_task(_collect(runtime, call_id, heard), name=f"{call_id}/captions")
    try:
        pushed_s = 0.0
        resampler = StreamResampler(rate_hz, api.INPUT_SAMPLE_RATE_HZ)
        activity = VoiceActivity(TelephonyConfig())
        position = 0
        size = 2 * rate_hz * _BLOCK_MS // 1000
        audio = pcm + bytes(2 * rate_hz * 2)  # silence closes the last segment
        for number, start in enumerate(range(0, len(audio), size)):
            block = audio[start : start + size]
            wide = resampler.push(block)
            request = api.PushAudio(call_id=call_id, pcm=wide, start_sample=position, voiced=activity.push(block))
            position += len(wide) // 2
            await runtime.send(request)
            pushed_s += _BLOCK_MS / 1000
            if number % _BLOCKS_AT_ONCE == 0:
                await heard.until(pushed_s - _MAX_BACKLOG_S)
        await heard.until_quiet(position / api.INPUT_SAMPLE_RATE_HZ)
        return heard.text
    finally:
        await runtime.send(api.CloseStream(call_id=call_id))
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


class _Heard:
    """What has come back so far; `at_s` is how far the runtime has listened."""

    def __init__(self) -> None:
        self.segments: dict[int, str] = {}
        self.at_s = 0.0
        self.changed = asyncio.Event()

    @property
    def text(self) -> str:
        return " ".join(self.segments[start] for start in sorted(self.segments) if self.segments[start])

    def take(self, event: api.RuntimeEvent) -> None:
        match event:
            case api.Caption():
                self.segments[event.start_sample] = event.text
            case api.DuplexPrediction():
                self.at_s = event.sample / api.INPUT_SAMPLE_RATE_HZ
            case api.StreamFailed():
                raise api.StreamLost(event.reason)
        self.changed.set()

    async def until(self, at_s: float) -> None:
        while self.at_s < at_s:
            await self._change(_QUIET_AFTER_S)

    async def until_quiet(self, end_s: float) -> None:
        """Predictions run on the input clock, captions behind it: wait until both have come to rest."""
        while await self._change(_QUIET_AFTER_S if self.at_s > end_s - 1.0 else 4 * _QUIET_AFTER_S):
            pass

    async def _change(self, timeout_s: float) -> bool:
        self.changed.clear()
        try:
            await asyncio.wait_for(self.changed.wait(), timeout_s)
        except TimeoutError:
            self.at_s += timeout_s  # nobody listens: do not wait for ever
            return False
        return True


async def _collect(runtime: api.Runtime, call_id: str, heard: _Heard) -> None:
    async for event in runtime.events(call_id):
        heard.take(event)


def plain_words(text: str) -> list[str]:
    """The form in which two texts are compared: numbers as digits one by one, no punctuation."""
    words = normalise_spoken(text.lower().replace(",", " ").replace(".", " ").replace("?", " ").replace("!", " "))
    return [piece for word in words.split() for piece in (list(word) if word.isdigit() else [word])]


def word_errors(wanted: list[str], got: list[str]) -> int:
    """Substitutions, deletions and insertions of the best alignment (Levenshtein)."""
    row = list(range(len(got) + 1))
    for i, word in enumerate(wanted, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(got, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def word_error_rate(wanted: str, got: str) -> float:
    """1.0 when nothing was wanted or nothing was right."""
    words = plain_words(wanted)
    return word_errors(words, plain_words(got)) / len(words) if words else 1.0
