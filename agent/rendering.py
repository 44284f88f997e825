"""Fixed sentences as audio, made before any call: heard at once, whatever the engine is doing.

Made with the engine's own voice when the stack starts for the first time with a checkpoint, and kept on disk under a
key of the checkpoint's content; later starts only read them. Which ones: what must not wait (the notice, fillers,
apologies).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import itertools
import wave
from collections.abc import Iterable
from pathlib import Path

from agent.call_setup import CACHED_PURPOSES
from agent.prompts.lines import LineBook
from minmo_runtime import api
from minmo_runtime.profiles import referenced_files
from policies.campaign import Campaign
from policies.engine import PolicyEngine
from policies.facts import CallFacts

STREAM_ID = "rendering"
MAX_SENTENCE_S = 15
_BLOCK_MS = 100
APOLOGY_PURPOSE = "engine_lost"  # what a media worker plays while there is no agent


class Untrained(Exception):
    """The engine says that parts of its checkpoint have no trained weights; the message is its label."""


def sentences(book: LineBook, campaigns: Iterable[Campaign]) -> list[str]:
    """Every sentence that is wanted as audio, in any campaign's words, each once."""
    found: dict[str, None] = {}
    for campaign in campaigns:
        texts = book.for_call(campaign.lines).texts
        found |= dict.fromkeys(text for purpose in sorted(CACHED_PURPOSES) for text in texts[purpose])
    return list(found)


def folder_for(storage_folder: Path, checkpoint: Path, models: str = "") -> Path:
    """checkpoint.toml names every weight file with its hash, so its own hash stands for all of them; a profile's public
    files and its prompt voice, which lie elsewhere, tell by size and time."""
    contents = checkpoint / "checkpoint.toml"
    digest = hashlib.sha256(contents.read_bytes())
    for weights in (*sorted(checkpoint.glob("*.safetensors")), *referenced_files(checkpoint, models)):
        status = weights.stat()  # changed in place without a new table of contents: size and time tell
        digest.update(f"{weights.name} {status.st_size} {status.st_mtime_ns}".encode())
    return storage_folder / "rendered" / digest.hexdigest()[:16]


def path_of(folder: Path, text: str) -> Path:
    return folder / (hashlib.sha256(text.encode()).hexdigest()[:24] + ".wav")


def missing(folder: Path, texts: Iterable[str]) -> list[str]:
    return [text for text in texts if not path_of(folder, text).is_file()]


def load(folder: Path, texts: Iterable[str]) -> tuple[dict[str, bytes], int]:
    """What is there, by sentence, and its sample rate."""
    audio: dict[str, bytes] = {}
    rate = 24_000
    for text in texts:
        path = path_of(folder, text)
        if path.is_file():
            with wave.open(str(path), "rb") as file:
                rate = file.getframerate()
                audio[text] = file.readframes(file.getnframes())
    return audio, rate


def prompt(policy: PolicyEngine) -> str:
    """As in a call of the first campaign: the voice was not trained on any other form."""
    facts = CallFacts(call_id=STREAM_ID, did=policy.campaigns[0].dids[0], started_at=dt.datetime.now(dt.UTC))
    return policy.system_prompt(facts)


async def render(runtime: api.Runtime, folder: Path, texts: Iterable[str], system_prompt: str) -> None:
    """Speak each text and keep what came; returns when all are on disk."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for index, text in enumerate(texts):
        # A stream each: within one, the engine makes audio only a few seconds ahead of when it would be played.
        pcm, rate_hz = await speak(runtime, f"{STREAM_ID}-{index}", text, system_prompt)
        _write(path_of(folder, text), pcm, rate_hz)


async def speak(runtime: api.Runtime, stream_id: str, text: str, system_prompt: str) -> tuple[bytes, int]:
    """One sentence as audio, and its rate; takes a stream of the engine meanwhile."""
    await runtime.send(api.OpenStream(call_id=stream_id, system_prompt=system_prompt))
    await runtime.send(api.Say(call_id=stream_id, turn_id="r", text=text))
    listening = asyncio.create_task(_be_silent(runtime, stream_id), name=f"{stream_id}/silence")
    try:
        return await _collect(runtime, stream_id, text)
    except BaseException:  # cancellation too: the engine must not keep the stream
        with contextlib.suppress(api.StreamLost):
            await runtime.send(api.CloseStream(call_id=stream_id))
        raise
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


async def _be_silent(runtime: api.Runtime, stream_id: str) -> None:
    """The far end of a stream always sends audio; it is the clock of a runtime that has no other (the fake)."""
    block = api.INPUT_SAMPLE_RATE_HZ * _BLOCK_MS // 1000
    for number in itertools.count():
        pcm = bytes(2 * block)
        await runtime.send(api.PushAudio(call_id=stream_id, pcm=pcm, start_sample=number * block, voiced=False))
        await asyncio.sleep(_BLOCK_MS / 1000)


async def _collect(runtime: api.Runtime, stream_id: str, text: str) -> tuple[bytes, int]:
    pcm, rate_hz = bytearray(), 0
    async for event in runtime.events(stream_id):
        match event:
            case api.StreamOpened():
                rate_hz = event.output_sample_rate_hz
                if "UNTRAINED" in event.checkpoint:
                    raise Untrained(event.checkpoint)
            case api.AudioDelta():
                pcm += event.pcm
                if len(pcm) > 2 * rate_hz * MAX_SENTENCE_S:  # a voice that does not find its end
                    await runtime.send(api.CloseStream(call_id=stream_id))
            case api.ReplyFinished():
                await runtime.send(api.CloseStream(call_id=stream_id))
            case api.StreamFailed():
                raise RuntimeError(f"the engine could not speak {text!r}: {event.reason}")
    return bytes(pcm), rate_hz


def _write(path: Path, pcm: bytes, rate_hz: int) -> None:
    part = path.with_suffix(".part")
    with wave.open(str(part), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(pcm)
    part.rename(path)
