"""`minmo bench answers [--speech-dir DIR] [--clips N]`: who answered, by sound alone, measured on real speech.

Each scene is what a callee's line sounds like after the answer, made of clips that real people spoke, over G.711
(mu-law or A-law) with line noise, through the received side of a leg as the media worker has it. Voicemails and menus
are prompts of a person (asterisk_ivr_prompts) one after another, voicemails with a beep; people are short words
(mycroft_pd_words, fsdd_en_digits), or the beginning of somebody's speech (calls_conversations), which few would answer
a telephone with. A recogniser's words are left out: this is the floor that they improve. The last line is one JSON
object. Clips stay where they are.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.answered_by import AnsweredBy, WhoAnswered
from agent.lab.rtp import DECODE, PCMA, PCMU
from telephony.answer_detection import AnswerDetector
from telephony.clips import read_clip
from telephony.config import TelephonyConfig
from telephony.frames import CallerAudio
from telephony.leg import AnswerEvidence

RATE_HZ = 8000
SPEECH = Path(__file__).resolve().parents[2] / "shared" / "speech"
SETS = ("asterisk_ivr_prompts", "mycroft_pd_words", "fsdd_en_digits", "calls_conversations")
LISTENS_S = 30.0
NOISE_DBOV = -62.0
RING_S = (0.2, 1.2)  # from the answer to the first sound
PROMPT_GAP_S = (0.1, 0.45)
GREETING_S, MENU_S, SPOKEN_S = 6.0, 9.0, 12.0
GREETING_WORDS = ("message", "not available", "unavailable", "answer your call", "take your call", "leave")
MENU_WORDS = ("press", "dial", "enter", "menu")
HUMAN = AnsweredBy.HUMAN.value
MACHINE = "machine"  # by sound a menu and a voicemail without a beep are one


@dataclass(frozen=True)
class Scene:
    truth: str  # human | machine | carrier_message
    kind: str
    pcm: np.ndarray  # int16 at RATE_HZ, mono
    word_end_s: float = 0.0  # of a person's first word
    beep_end_s: float = 0.0


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    missing = [name for name in SETS if not (options.speech_dir / name / "manifest.jsonl").is_file()]
    if missing:
        print(f"bench answers: --speech-dir {options.speech_dir}: must hold {', '.join(missing)}", file=sys.stderr)
        return 2
    results = [(scene, judge(scene)) for scene in scenes(options.speech_dir, options.clips)]
    summary = summarise(results)
    _print(summary)
    print(json.dumps(summary))
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="minmo bench answers", description=__doc__)
    parser.add_argument("--speech-dir", type=Path, default=SPEECH)
    parser.add_argument("--clips", type=int, default=60, help="scenes of each kind (default 60)")
    options = parser.parse_args(arguments)
    if options.clips < 1:
        parser.error(f"--clips {options.clips}: must be at least 1")
    return options


# ------------------------------------------------------------------ scenes


def scenes(folder: Path, num_each: int) -> Iterator[Scene]:
    """The same for the same folder."""
    chance = random.Random(5)
    english = [row for row in _rows(folder, "asterisk_ivr_prompts") if row["lang"] == "en" and row.get("text")]
    greetings = [row for row in english if row["sec"] > 1.5 and _has(row, GREETING_WORDS) and not _has(row, MENU_WORDS)]
    menus = [row for row in english if row["sec"] > 1.5 and _has(row, MENU_WORDS)]
    for _ in range(num_each):
        yield _voicemail(chance, folder, greetings, has_beep=True)
        yield _voicemail(chance, folder, greetings, has_beep=False)
        yield Scene(MACHINE, "menu", _on_the_line(chance, [_prompts(chance, folder, menus, MENU_S)]))
        yield _special_information(chance, folder, english)
    for kind in ("mycroft_pd_words", "fsdd_en_digits"):
        for row in _sample(chance, _rows(folder, kind), num_each):
            yield _person(chance, kind, _clip(folder, kind, row))
    calls = [row for row in _rows(folder, "calls_conversations") if "_caller" in row["path"] or row["sec"] < 7]
    for row in _sample(chance, calls, num_each):
        yield _person(
            chance, "calls_conversations", _clip(folder, "calls_conversations", row)[: int(SPOKEN_S * RATE_HZ)]
        )


def _voicemail(chance: random.Random, folder: Path, rows: list[dict[str, Any]], *, has_beep: bool) -> Scene:
    greeting = _prompts(chance, folder, rows, GREETING_S)
    if not has_beep:
        return Scene(MACHINE, "voicemail without a beep", _on_the_line(chance, [greeting]))
    lead, gap = _silence(chance.uniform(*RING_S)), _silence(chance.uniform(0.2, 1.2))
    tone = _tone(chance.uniform(0.2, 0.9), chance.choice((420, 440, 850, 950, 1000, 1400)))
    end_s = sum(map(len, (lead, greeting, gap, tone))) / RATE_HZ
    return Scene(
        MACHINE, "voicemail", _on_the_line(chance, [greeting, gap, tone], lead), beep_end_s=end_s
    )  # fmt: skip


def _special_information(chance: random.Random, folder: Path, rows: list[dict[str, Any]]) -> Scene:
    three = [_tone(0.33, hz) for hz in (950, 1400, 1800)]
    return Scene("carrier_message", "SIT", _on_the_line(chance, [*three, _prompts(chance, folder, rows, 3.0)]))


def _person(chance: random.Random, kind: str, clip: np.ndarray) -> Scene:
    """`word_end_s`: where its first stretch of energy ends, 0.4 s of silence after it."""
    lead = _silence(chance.uniform(*RING_S))
    loud = np.array([np.abs(block).max() > 500 for block in _blocks(clip)])
    voiced = np.flatnonzero(loud)
    pauses = np.flatnonzero(np.diff(voiced) > 20) if len(voiced) else np.array([], int)
    last = voiced[pauses[0]] if len(pauses) else voiced[-1] if len(voiced) else 0
    end_s = len(lead) / RATE_HZ + 0.02 * (int(last) + 1)
    return Scene(HUMAN, f"person: {kind}", _on_the_line(chance, [clip], lead), word_end_s=end_s)


def _prompts(chance: random.Random, folder: Path, rows: list[dict[str, Any]], seconds: float) -> np.ndarray:
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < seconds * RATE_HZ:
        parts += [_trimmed(_clip(folder, "asterisk_ivr_prompts", chance.choice(rows)))]
        parts += [_silence(chance.uniform(*PROMPT_GAP_S))]
    return np.concatenate(parts[:-1])


def _on_the_line(chance: random.Random, parts: list[np.ndarray], lead: np.ndarray | None = None) -> np.ndarray:
    """Noise, then G.711 there and back."""
    first = _silence(chance.uniform(*RING_S)) if lead is None else lead
    sound = np.concatenate([first, *parts, _silence(4.0)]).astype(float)[: int(LISTENS_S * RATE_HZ)]
    sound += np.random.default_rng(chance.randrange(1 << 30)).normal(0, 32768 * 10 ** (NOISE_DBOV / 20), len(sound))
    levels = np.sort(DECODE[chance.choice((PCMU, PCMA))].astype(np.int32))
    at = np.clip(np.searchsorted(levels, sound), 1, len(levels) - 1)
    is_lower = sound - levels[at - 1] < levels[at] - sound
    return np.asarray(np.where(is_lower, levels[at - 1], levels[at]), "<i2")


def _trimmed(clip: np.ndarray) -> np.ndarray:
    """Prompts have silence around them, which a machine that plays several does not add up."""
    loud = np.flatnonzero(np.abs(clip) > 300)
    return clip[loud[0] : loud[-1] + 1] if len(loud) else clip


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / name / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _sample(chance: random.Random, rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    return chance.sample(rows, min(most, len(rows)))


def _has(row: dict[str, Any], words: tuple[str, ...]) -> bool:
    return any(word in row["text"].lower() for word in words)


def _clip(folder: Path, name: str, row: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(read_clip(folder / name / row["path"], RATE_HZ), "<i2")


def _silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * RATE_HZ), "<i2")


def _tone(seconds: float, hz: float) -> np.ndarray:
    return (6000 * np.sin(2 * math.pi * hz * np.arange(int(seconds * RATE_HZ)) / RATE_HZ)).astype("<i2")


def _blocks(clip: np.ndarray) -> np.ndarray:
    size = RATE_HZ // 50
    return clip[: len(clip) // size * size].reshape(-1, size)


# ------------------------------------------------------------------ judged


@dataclass(frozen=True)
class Judged:
    first: str
    first_s: float | None
    final: str
    beep_s: float | None  # when a beep was told of
    was_beep_found: bool
    is_sure_machine: bool  # at any time: a campaign that leaves no message would have hung up


def judge(scene: Scene) -> Judged:
    """Detector and verdict, as in a call whose agent is still in its opening."""
    config = TelephonyConfig(echo_canceller="off")
    audio = CallerAudio(config)
    detector = AnswerDetector("bench", RATE_HZ, config.vad_hangover_ms)
    who = WhoAnswered(RATE_HZ)
    first: tuple[str, float] | None = None
    is_sure_machine = False
    beeps: list[tuple[float, AnswerEvidence]] = []
    size = config.samples_per_frame
    pcm = scene.pcm.tobytes()
    for start in range(0, len(scene.pcm) - size + 1, size):
        frame = pcm[2 * start : 2 * (start + size)]
        _, is_voiced = audio.listen(frame, bytes(2 * size))
        verdict = None
        for evidence in detector.push(frame, is_voiced):
            verdict = who.hear(evidence, may_be_person=False, is_greeted=False) or verdict
            if evidence.kind == "beep":
                beeps.append(((start + size) / RATE_HZ, evidence))
        verdict = who.pass_time(start + size) or verdict
        is_sure_machine = is_sure_machine or (who.is_machine and who.is_sure)
        if verdict is not None and first is None:
            first = verdict.kind.value, (start + size) / RATE_HZ
    told = [at for at, beep in beeps if abs(beep.sample / RATE_HZ - scene.beep_end_s) < 0.1]
    kind, at_s = first or (AnsweredBy.UNDECIDED.value, None)
    return Judged(
        kind, at_s, who.kind.value, told[0] if told else (beeps[0][0] if beeps else None), bool(told), is_sure_machine
    )


def summarise(results: list[tuple[Scene, Judged]]) -> dict[str, Any]:
    """Per kind of scene: n, verdicts (first and final), decision times; beeps found and told of by mistake."""
    table: dict[str, Any] = {}
    for kind in dict.fromkeys(scene.kind for scene, _ in results):
        found = [(scene, judged) for scene, judged in results if scene.kind == kind]
        right = [(s, j) for s, j in found if j.first_s is not None and as_truth(j.first) == s.truth]
        after_word = [1000 * (j.first_s - s.word_end_s) for s, j in right if s.word_end_s and j.first_s is not None]
        table[kind] = {
            "truth": found[0][0].truth, "n": len(found),
            "first": dict(Counter(judged.first for _, judged in found)),
            "final": dict(Counter(judged.final for _, judged in found)),
            "sure_of_machine": sum(judged.is_sure_machine for _, judged in found),
            "decision_ms": _percentiles([1000 * j.first_s for _, j in right if j.first_s is not None]),
            "after_first_word_ms": _percentiles(after_word),
        }  # fmt: skip
    beeps = [(scene, judged) for scene, judged in results if scene.beep_end_s]
    told = [1000 * (j.beep_s - s.beep_end_s) for s, j in beeps if j.was_beep_found and j.beep_s is not None]
    without = [judged for scene, judged in results if not scene.beep_end_s and scene.truth != "carrier_message"]
    return {
        "answers": table,
        "beeps": {"n": len(beeps), "found": len(told), "told_after_ms": _percentiles(told)},
        "beeps_by_mistake": {"n": len(without), "told": sum(judged.beep_s is not None for judged in without)},
    }  # fmt: skip


def as_truth(kind: str) -> str:
    return MACHINE if kind in (AnsweredBy.VOICEMAIL, AnsweredBy.IVR, AnsweredBy.CALL_SCREENER) else kind


def _percentiles(values: list[float]) -> dict[str, float | int]:
    """Nearest rank; empty without values."""
    ordered = sorted(values)
    if not ordered:
        return {"n": 0}
    p50, p95 = (round(ordered[math.ceil(share * len(ordered)) - 1]) for share in (0.5, 0.95))
    return {"n": len(ordered), "p50": p50, "p95": p95}


def _print(summary: dict[str, Any]) -> None:
    print(
        f"{'scene':<30} {'n':>4}  {'first verdict':<38} {'final verdict':<38} {'hung up':>7} {'p50':>6} {'p95':>6} ms"
    )
    for kind, row in summary["answers"].items():
        first, final = (", ".join(f"{who} {n}" for who, n in sorted(row[name].items())) for name in ("first", "final"))
        times = row["after_first_word_ms"] if row["after_first_word_ms"]["n"] else row["decision_ms"]
        p50, p95 = times.get("p50", "-"), times.get("p95", "-")
        sure = row["sure_of_machine"]
        print(f"{kind:<30} {row['n']:>4}  {first:<38} {final:<38} {sure:>7} {p50:>6} {p95:>6}")
    beeps, mistaken = summary["beeps"], summary["beeps_by_mistake"]
    print(f"beeps found: {beeps['found']} of {beeps['n']}, told after {beeps['told_after_ms']}")
    print(f"told of a beep by mistake: {mistaken['told']} of {mistaken['n']} scenes without one")
    print("hung up: sure of a machine, so that a campaign without messages would have ended the call")
    print("times: a person's from the end of the first word, the others' from the answer; right first verdicts only")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
