"""`minmo eval`: what nano understands and does, with n beside every figure. Definitions: docs/evaluation.md.

    minmo eval [--calls 30] [--sip-calls 5] [--words 1500] [--checkpoint DIR] [--speech-dir DIR] [--seed 1]

Callers are synthesised with voices and phrasings that were held out of training (needs espeak-ng); people's clips are
taken from a folder of recordings when there is one. The last line is JSON. Nothing here is gated.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agent import rendering
from agent.app import Stack
from agent.call_setup import CallSetup
from agent.caller import run_caller
from agent.caller_script import BargeIn, CallerScript, Hangup, Say, Step, Wait, WaitForAgent
from agent.checkpoint import SHIPPED_CHECKPOINT, checkpoint_facts
from agent.config import Config, load_config
from agent.demo_script import answer_words
from agent.lab.virtual_call import LabCall, hear
from agent.prompts.lines import LineBook
from agent.recognise import plain_words, word_errors
from agent.tools.shop import Shop
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.engine import Engine, load_engine
from minmo_runtime.training import corpus, data, sentences, synthesis
from policies.config import PoliciesConfig
from policies.engine import PolicyEngine
from policies.facts import CallFacts
from storage.calls import CallStore
from storage.config import StorageConfig
from storage.orders import Order
from storage.search import CallReader

RATE_HZ = 8_000
SPEECH_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "speech"  # beside a checkout, where there is one
LONG_ANSWER = "what can you help with"  # the agent's longest reply follows: room for an overlap
BACKCHANNEL = "okay"  # espeak-ng spells "mm hm" letter by letter
FALSE_STOP_SILENCE_MS = 700.0  # design §7
TASKS = ("look_up_order", "opening_hours", "change_delivery", "person")


@dataclass(frozen=True)
class Task:
    """What the caller wants, in which words, and which tool call fulfils it."""

    name: str
    said: tuple[str, ...]
    arguments: dict[str, str]
    must_say: tuple[tuple[str, ...], ...] = ()


@dataclass
class Overlaps:
    """Figures of overlaps, in ms, and counts."""

    duck_ms: list[float] = field(default_factory=list)
    stop_ms: list[float] = field(default_factory=list)
    num_barge_ins: int = 0
    num_backchannels: int = 0
    num_false_stops: int = 0


class Voices:
    """Callers nobody trained on."""

    def __init__(self, seed: int, work_folder: Path) -> None:
        self._rng = np.random.default_rng(seed)
        self._espeak = synthesis.Espeak(synthesis.prepare_voice_folder(work_folder))

    def draw(self) -> tuple[str, synthesis.Prosody]:
        return synthesis.random_caller_voice(self._rng, True), synthesis.random_caller_prosody(self._rng)

    def say(self, text: str, voice: tuple[str, synthesis.Prosody]) -> bytes:
        waveform, _ = self._espeak.synthesise(text, *voice)
        waveform, _ = synthesis.trim_silence(waveform, synthesis.ESPEAK_RATE_HZ)
        return as_pcm(synthesis.to_rate(waveform, RATE_HZ))


def as_pcm(waveform: np.ndarray) -> bytes:
    peak = max(1e-6, float(np.abs(waveform).max(initial=0.0)))
    return (waveform * (0.45 / peak) * 32767).astype("<i2").tobytes()


# ---------------------------------------------------------------------- recognition


def recognition(engine: Engine, clips: Iterator[tuple[str, bytes]], num_words: int) -> dict[str, Any]:
    """Word error rate over clips until `num_words` reference words are counted."""
    errors = words = clips_heard = 0
    for text, pcm in clips:
        wanted = plain_words(text)
        errors += word_errors(wanted, plain_words(hear(engine, pcm, RATE_HZ)))
        words += len(wanted)
        clips_heard += 1
        if words >= num_words:
            break
    return {"wer": round(errors / words, 4) if words else None, "n_words": words, "n_clips": clips_heard}


def synthetic_clips(voices: Voices, seed: int) -> Iterator[tuple[str, bytes]]:
    for text in sentences.caller_utterances(seed, "held", 2_000):
        yield text, voices.say(text, voices.draw())


def human_clips(folder: Path, seed: int) -> Iterator[tuple[str, bytes]]:
    clips = data.human_clips(folder, held_out=True)
    random.Random(seed).shuffle(clips)
    for clip in clips:
        yield clip.text, as_pcm(synthesis.to_rate(data.read_clip(clip), RATE_HZ, data.RATE_HZ))


# -------------------------------------------------------------------------- calls


def make_task(name: str, orders: list[Order], rng: random.Random) -> Task:
    """Phrasings held out of training; the number in one breath or when asked."""
    order = rng.choice(orders)
    spoken = corpus.spoken_number(order.order_number, rng)
    day = rng.choice(corpus.WEEKDAYS)
    match name:
        case "look_up_order":
            must_say = answer_words(order.status, order.day)
            if rng.random() < 0.5:
                said: tuple[str, ...] = (_phrase("order_status_number", rng, spoken),)
            else:
                said = (_phrase("order_status", rng), _phrase("number_only", rng, spoken))
            return Task(name, said, {"order_number": order.order_number}, must_say)
        case "opening_hours":
            return Task(name, (_phrase("hours_day", rng, day=day),), {"day": day})
        case "change_delivery":
            said = (_phrase("change_both", rng, spoken, day),)
            return Task(name, said, {"order_number": order.order_number, "day": day})
    return Task("transfer", (_phrase("person", rng),), {})


def _phrase(intent: str, rng: random.Random, spoken: str = "", day: str = "") -> str:
    return corpus.fill_phrase(corpus.phrase(intent, "held", rng), spoken, day)


def task_script(task: Task, voices: Voices, overlap: str = "") -> CallerScript:
    """`overlap`: "barge_in" or "backchannel" over a long answer, before the task."""
    voice = voices.draw()
    answered = WaitForAgent(silent_ms=1_300, timeout_ms=12_000)
    steps: list[Step] = [answered]
    if overlap:
        steps.append(Say(voices.say(LONG_ANSWER, voice), "long"))
        text = "no wait i have another question" if overlap == "barge_in" else BACKCHANNEL
        steps += [BargeIn(voices.say(text, voice), 1_000, overlap), answered]
    for index, text in enumerate(task.said):
        steps += [Say(voices.say(text, voice), f"task{index}"), answered]
    return CallerScript((*steps, Wait(300), Hangup()))


def is_fulfilled(task: Task, tools: list[dict[str, Any]], turns: list[dict[str, Any]]) -> bool:
    """The tool was asked for with exactly these values, and the answer says what it must."""
    asked = [tool for tool in tools if tool["name"] == task.name and dict(tool["arguments"]) == task.arguments]
    if not asked:
        return False
    answer = " ".join(t.get("generated_text") or "" for t in turns if t["turn_id"] == asked[-1]["turn_id"]).split()
    spoken = {word.strip(".,?!") for word in answer}
    return all(spoken & set(words) for words in task.must_say)


class Lab:
    """Simulated calls against one engine, with a shop of their own."""

    def __init__(self, engine: Engine, checkpoint: Path, folder: Path, voices: Voices, seed: int) -> None:
        self.engine, self.voices, self.rng = engine, voices, random.Random(seed)
        self.store = CallStore(StorageConfig(folder=folder, is_synced=False), is_background=False)
        self.store.seed_demo_shop()
        self.orders = self.store.list_orders()
        self.book = LineBook.load()
        self.policy = PolicyEngine.load(
            PoliciesConfig(), checkpoint_facts(checkpoint), handoff_uri="sip:desk@127.0.0.1", line_keys=self.book.keys
        )
        self.rendered = self._render()
        self.overlaps = Overlaps()
        self.counter = itertools.count(1)

    def _render(self) -> dict[str, bytes]:
        """Silence of a likely length stands for the notice: the voice is judged elsewhere, the floor needs its time."""
        texts = rendering.sentences(self.book, self.policy.campaigns)
        tone = (3000 * np.sin(np.arange(24_000) * 2 * np.pi * 180 / 24_000)).astype("<i2").tobytes()
        return {text: tone * max(1, len(text.split()) // 3) for text in texts}

    def call(self, task: Task, overlap: str = "") -> bool:
        campaign = self.policy.campaigns[0]
        call_id = f"lab{next(self.counter)}"
        now = dt.datetime.now(dt.UTC)
        setup = CallSetup(
            call_id=call_id,
            leg_id=call_id,
            sample_rate_hz=RATE_HZ,
            facts=CallFacts(call_id=call_id, did=campaign.dids[0], started_at=now),
            policy=self.policy,
            lines=self.book.for_call(campaign.lines),
            order_digits=campaign.order_digits,
            tools=campaign.tools,
            rendered=self.rendered,
        )
        shop = Shop(self.store, call_id, campaign.name, can_transfer=True)
        done = LabCall(self.engine, setup, task_script(task, self.voices, overlap), shop.check).run()
        if overlap:
            self._count(done, overlap)
        tools = [a for a in done.keeps("record_tool_call") if a["state"] != "refused"]
        return is_fulfilled(task, tools, done.turns)

    def _count(self, done: LabCall, overlap: str) -> None:
        figures = [(a["name"], a["value"]) for a in done.keeps("add_metric")]
        cut = any(turn.get("was_interrupted") for turn in done.turns)
        if overlap == "barge_in":
            self.overlaps.num_barge_ins += 1
            self.overlaps.duck_ms += [value for name, value in figures if name == "duck_ms"][:1]
            self.overlaps.stop_ms += [value for name, value in figures if name == "stop_ms"][:1]
        else:
            self.overlaps.num_backchannels += 1
            paused = any(name == "pause_ms" and value > FALSE_STOP_SILENCE_MS for name, value in figures)
            self.overlaps.num_false_stops += cut or paused


def simulated_calls(lab: Lab, num_calls: int) -> dict[str, Any]:
    """Each task in turn; every second call also has an overlap before it."""
    fulfilled: dict[str, list[bool]] = {}
    for index in range(num_calls):
        task = make_task(TASKS[index % len(TASKS)], lab.orders, lab.rng)
        overlap = ("", "barge_in", "", "backchannel")[(index // len(TASKS) + index) % 4]
        fulfilled.setdefault(task.name, []).append(lab.call(task, overlap))
    every = [ok for oks in fulfilled.values() for ok in oks]
    return {
        "task_success": round(sum(every) / len(every), 3) if every else None,
        "n_calls": len(every),
        "by_task": {name: f"{sum(oks)}/{len(oks)}" for name, oks in fulfilled.items()},
    }


def overlap_figures(overlaps: Overlaps) -> dict[str, Any]:
    return {
        "duck_ms": spread(overlaps.duck_ms),
        "stop_ms": spread(overlaps.stop_ms),
        "missed_stops": f"{overlaps.num_barge_ins - len(overlaps.stop_ms)}/{overlaps.num_barge_ins}",
        "false_stops": f"{overlaps.num_false_stops}/{overlaps.num_backchannels}",
    }


def spread(values: list[float]) -> dict[str, Any]:
    ordered = sorted(values)
    at_95 = ordered[round(0.95 * (len(ordered) - 1))] if ordered else None
    return {"p50": statistics.median(ordered) if ordered else None, "p95": at_95, "n": len(ordered)}


# ---------------------------------------------------------------------------- SIP


async def sip_calls(config: Config, voices: Voices, num_calls: int, seed: int) -> dict[str, Any]:
    """The same tasks over RTP, judged from the database; latencies from the wire."""
    rng = random.Random(seed)
    store = CallStore(config.storage)
    store.seed_demo_shop()
    orders = store.list_orders()
    store.close()
    fulfilled: list[bool] = []
    async with Stack(config, has_web=False) as stack:
        reader = CallReader.open(stack.config.storage)
        for index in range(num_calls):
            task = make_task(TASKS[index % len(TASKS)], orders, rng)
            await run_caller(f"sip:100@{stack.sip_address}", task_script(task, voices), max_duration_s=90.0)
            await asyncio.sleep(0.5)
            call = reader.get_call(reader.list_calls(limit=1)[0]["call_id"])
            fulfilled.append(is_fulfilled(task, call["tool_calls"], call["turns"]))
        latencies = reader.get_metric_values("voice_to_voice_ms")
        reader.close()
    success = round(sum(fulfilled) / len(fulfilled), 3) if fulfilled else None
    return {"task_success": success, "n_calls": len(fulfilled), "voice_to_voice_ms": spread(latencies)}


# --------------------------------------------------------------------------- main


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="minmo-eval-") as name:
        folder = Path(name)
        voices = Voices(options.seed, options.work)
        engine = load_engine(options.checkpoint, RuntimeConfig())
        result: dict[str, Any] = {"checkpoint": engine.checkpoint.label, "bridges": list(engine.checkpoint.bridges)}
        if options.speech_dir.is_dir():
            human = recognition(engine, human_clips(options.speech_dir, options.seed), options.words)
            _say(result, "people", human)
        else:
            print(f"people: no recordings at {options.speech_dir} (--speech-dir)", flush=True)
        _say(result, "synthetic", recognition(engine, synthetic_clips(voices, options.seed), options.words))
        lab = Lab(engine, options.checkpoint, folder / "lab", voices, options.seed)
        _say(result, "calls", simulated_calls(lab, options.calls))
        _say(result, "overlaps", overlap_figures(lab.overlaps))
        lab.store.close()
        if options.sip_calls:
            config = load_config(None, {
                "agent": {"checkpoint": str(options.checkpoint), "log_level": "warning"},
                "telephony": {"sip_port": 0}, "storage": {"folder": str(folder / "sip")},
            })  # fmt: skip
            _say(result, "sip", asyncio.run(sip_calls(config, voices, options.sip_calls, options.seed)))
    print(json.dumps(result), flush=True)
    return 0


def _say(result: dict[str, Any], name: str, figures: dict[str, Any]) -> None:
    result[name] = figures
    print(f"{time.strftime('%H:%M:%S')} {name}: {json.dumps(figures)}", flush=True)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="minmo eval", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--calls", type=int, default=30, help="simulated calls in the lab")
    parser.add_argument("--sip-calls", type=int, default=5, help="further calls over SIP")
    parser.add_argument("--words", type=int, default=1_500, help="reference words per recognition score")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_CHECKPOINT)
    parser.add_argument("--speech-dir", type=Path, default=SPEECH_FOLDER, help="recordings of people")
    parser.add_argument("--work", type=Path, default=Path("work") / "voices", help="where espeak-ng's data is prepared")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)
