"""Training audio of the voice encoder, regenerable from a seed: spoken sentences with features, words and frame labels.

`build_shard` speaks sentences with random training voices (synthesis), sends them through random lines (channel),
mixes in human
clips, and stores features. A shard is a few hundred MiB at most and never committed; fresh ones are made while
training runs:

    python -m minmo_runtime.training.data --work-dir WORK --shards 10 --hours 1.5 [--speech-dir DIR]

Shard layout (npz): `features` float16 [sum F, 80], `starts` int64 [N + 1] into it (fbank frames), `texts` [N],
`phonemes` int16
[sum T25] with -100 where unknown, `phoneme_starts` [N + 1], `tags` int8 [N, 3] (language, emotion, event; -1
unknown), `human` bool [N].
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from numpy.random import Generator

from minmo_runtime.features import fbank, num_frames
from minmo_runtime.training import channel, corpus, sentences, synthesis

RATE_HZ = 16_000
LANGUAGES = ("en", "zh", "other")
EMOTIONS = ("neutral", "excited", "subdued")
EVENTS = ("speech", "noise")
UNKNOWN = -100
# People whose clips are never trained on: the human score of the model card is theirs.
HELD_OUT_SPEAKERS = ("fsdd_yweweler", "so_0036", "so_0482", "so_0739", "so_1029", "so_1336")
ENGLISH_SETS = (
    "fsdd_en_digits",
    "kathleen_en_us",
    "asterisk_ivr_prompts",
    "mycroft_pd_words",
    "speechocean_en_mandarinL1",
)


@dataclass(frozen=True)
class HumanClip:
    path: Path
    text: str
    speaker: str
    collection: str
    seconds: float


@dataclass
class Utterance:
    """One training item; `phonemes` are 25 Hz labels or None (human clips)."""

    waveform: np.ndarray
    text: str
    phonemes: np.ndarray | None
    tags: tuple[int, int, int]
    is_human: bool = False


def plain_words(text: str) -> str:
    """Lower case, letters and apostrophes only; "" if digits or symbols remain (their reading is unknown)."""
    text = text.lower().replace("’", "'").replace("-", " ")
    text = re.sub(r"[.,;:!?\"()\[\]]", " ", text)
    return "" if re.search(r"[^a-z' ]", text) else " ".join(text.split())


def human_clips(speech_dir: Path, held_out: bool = False) -> list[HumanClip]:
    """English clips with a usable transcript; `held_out` selects the people never trained on."""
    clips = []
    for name in ENGLISH_SETS:
        manifest = speech_dir / name / "manifest.jsonl"
        if not manifest.exists():
            continue
        for line in manifest.read_text().splitlines():
            item = json.loads(line)
            text = plain_words(item.get("text") or "")
            if not text or item["lang"] != "en" or not 0.15 <= item["sec"] <= 9.0:
                continue
            if ((item["speaker"] or "") in HELD_OUT_SPEAKERS) == held_out:
                clips.append(
                    HumanClip(speech_dir / name / item["path"], text, item["speaker"] or name, name, item["sec"])
                )
    return clips


def read_clip(clip: HumanClip) -> np.ndarray:
    waveform, rate = soundfile.read(clip.path, dtype="float32", always_2d=True)
    return soxr.resample(waveform[:, 0], rate, RATE_HZ).astype(np.float32)


class HumanUtterances:
    """Human clips as utterances; single digits are joined to strings of one speaker, as people read numbers aloud."""

    def __init__(self, clips: list[HumanClip]) -> None:
        self._waves = [(clip, synthesis.trim_silence(read_clip(clip), RATE_HZ, 0.06, 0.01)[0]) for clip in clips]
        self._digits: dict[str, list[tuple[HumanClip, np.ndarray]]] = {}
        self._sentences = [item for item in self._waves if item[0].collection != "fsdd_en_digits"]
        for item in self._waves:
            if item[0].collection == "fsdd_en_digits":
                self._digits.setdefault(item[0].speaker, []).append(item)

    def draw(self, rng: Generator, digit_share: float = 0.5) -> Utterance:
        if self._digits and (rng.random() < digit_share or not self._sentences):
            speaker = list(self._digits)[rng.integers(len(self._digits))]
            picks = [
                self._digits[speaker][i] for i in rng.integers(len(self._digits[speaker]), size=rng.integers(1, 7))
            ]
            pieces = []
            for _, wave in picks:
                pieces += [
                    wave / max(channel.rms(wave), 1e-4) * 0.1,
                    np.zeros(int(rng.uniform(0.02, 0.35) * RATE_HZ), np.float32),
                ]
            return Utterance(np.concatenate(pieces), " ".join(c.text for c, _ in picks), None, (0, -1, 0), True)
        clip, wave = self._sentences[rng.integers(len(self._sentences))]
        return Utterance(wave, clip.text, None, (0, -1, 0), True)


def domain_keep(open_share: float) -> Callable[[str], float]:
    """Utterances with more than a third of their words outside the callers' phrases are used with probability
    `open_share`:
    open sentences teach sounds, but at this size and budget most of the time belongs to what callers say."""
    templates = [text for intent in corpus.INTENTS for text in corpus.phrases()[intent]["train"]]
    shapes = corpus.phrases()["shapes"].values()
    templates += [part for forms in shapes for form in forms for choices in form for part in choices]
    words = {word for text in templates for word in text.split()}
    words |= {
        word
        for key in ("openers", "requests", "closers", "fillers")
        for text in corpus.phrases()[key]
        for word in text.split()
    }
    words |= {word for text in corpus.agent_lines() for word in plain_words(text).split()}
    words |= {
        word
        for text in corpus.replies().values()
        for word in plain_words(text.replace("{", "").replace("}", "")).split()
    }
    words |= set("zero oh one two three four five six seven eight nine double".split())
    words |= set("monday tuesday wednesday thursday friday saturday sunday today tomorrow".split())

    def keep(text: str) -> float:
        parts = text.split()
        return open_share if sum(part not in words for part in parts) * 3 > len(parts) else 1.0

    return keep


class PhonemeLabels:
    """Names -> ids, kept in a file so that all shards agree."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.names: list[str] = json.loads(path.read_text()) if path.exists() else []

    def frames(self, events: list[synthesis.PhonemeEvent], offset_s: float, num_frames_25hz: int) -> np.ndarray:
        """Label of the phoneme sounding at 40 ms * t, `offset_s` = what was cut in front (negative: added)."""
        starts = np.array([event.start_s - offset_s for event in events])
        ids = np.array([self._id(event.name) for event in events] or [0])
        where = np.searchsorted(starts, np.arange(num_frames_25hz) * 0.04 + 1e-6, side="right") - 1
        return np.where(where >= 0, ids[where.clip(0)], self._id("_")).astype(np.int16)

    def _id(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
            self._path.write_text(json.dumps(self.names))
        return self.names.index(name)


def emotion_of(prosody: synthesis.Prosody) -> int:
    """Acted emotion as espeak can act it: fast, high and wide = excited; slow, low and flat = subdued; else neutral."""
    if prosody.rate_wpm >= 180 and prosody.pitch >= 50 and prosody.pitch_range >= 60:
        return EMOTIONS.index("excited")
    if prosody.rate_wpm <= 155 and prosody.pitch <= 45 and prosody.pitch_range <= 45:
        return EMOTIONS.index("subdued")
    return EMOTIONS.index("neutral")


def speak(
    espeak: synthesis.Espeak,
    text: str,
    rng: Generator,
    voice: str,
    labels: PhonemeLabels,
    prosody: synthesis.Prosody | None = None,
) -> Utterance | None:
    """One synthetic utterance with outer silence as the gate of the serving path leaves it; random prosody unless
    given."""
    prosody = prosody or synthesis.random_caller_prosody(rng)
    raw, events = espeak.synthesise(text, voice, prosody)
    if len(raw) < 2000:
        return None
    trimmed, cut_s = synthesis.trim_silence(raw, synthesis.ESPEAK_RATE_HZ)
    lead_s, tail_s = rng.uniform(0.05, 0.6), rng.uniform(0.1, 0.7)
    wave = soxr.resample(trimmed, synthesis.ESPEAK_RATE_HZ, RATE_HZ, quality="MQ").astype(np.float32)
    wave = np.concatenate(
        [np.zeros(int(lead_s * RATE_HZ), np.float32), wave, np.zeros(int(tail_s * RATE_HZ), np.float32)]
    )
    count = -(-num_frames(len(wave)) // 4)
    return Utterance(wave, text, labels.frames(events, cut_s - lead_s, count), (0, emotion_of(prosody), 0))


def utterances(
    seed: int, work_dir: Path, speech_dir: Path | None, held_out: bool, human_share: float, open_share: float = 1.0
) -> Iterator[Utterance]:
    """Endless stream of undegraded utterances; `open_share`: see `domain_keep`, below 1 people mostly say digits."""
    keep = domain_keep(open_share)
    rng = np.random.default_rng(seed)
    espeak = synthesis.Espeak(synthesis.prepare_voice_folder(work_dir / "voices"))
    labels = PhonemeLabels(work_dir / "phonemes.json")
    clips = human_clips(speech_dir, held_out) if speech_dir and human_share else []
    people = HumanUtterances(clips) if clips else None
    while True:
        for block, text in enumerate(
            sentences.caller_utterances(int(rng.integers(1 << 30)), "held" if held_out else "train")
        ):
            if block % 3 == 0:
                voice = synthesis.random_caller_voice(rng, held_out)
            if people and rng.random() < human_share:
                yield people.draw(rng, 0.5 if open_share == 1 else 0.85)
            if rng.random() < 0.015:
                yield Utterance(np.zeros(int(rng.uniform(0.5, 3) * RATE_HZ), np.float32), "", None, (-1, -1, 1))
            if rng.random() >= keep(text):
                continue
            item = speak(espeak, text, rng, voice, labels)
            if item is not None and item.waveform.size < 12 * RATE_HZ:
                yield item


def build_shard(path: Path, seed: int, hours: float, work_dir: Path, speech_dir: Path | None, held_out: bool = False,
                human_share: float = 0.28, telephone_share: float = 0.6, open_share: float = 1.0) -> None:  # fmt: skip
    """Write one shard of about `hours` hours; `human_share` counts utterances."""
    rng = np.random.default_rng(seed + 1)
    write_shard(
        path, utterances(seed, work_dir, speech_dir, held_out, human_share, open_share), rng, telephone_share, hours
    )


def build_human_shard(path: Path, speech_dir: Path, work_dir: Path, count: int) -> None:
    """People never trained on, half on the telephone band: `count` utterances of at most an hour."""
    rng = np.random.default_rng(11)
    people = HumanUtterances(human_clips(speech_dir, held_out=True))
    write_shard(path, (people.draw(rng) for _ in range(count)), rng, 0.5, 1.0)


def agent_sentences(seed: int, work_dir: Path, split: str, own_voice_share: float) -> Iterator[Utterance]:
    """What the agent says, in the agent's own voice or a random training voice; endless."""
    rng = np.random.default_rng(seed)
    espeak = synthesis.Espeak(synthesis.prepare_voice_folder(work_dir / "voices"))
    labels = PhonemeLabels(work_dir / "phonemes.json")
    while True:
        for text in sentences.agent_utterances(int(rng.integers(1 << 30)), split):
            own = rng.random() < own_voice_share
            voice = synthesis.AGENT_VOICE if own else synthesis.random_caller_voice(rng, False)
            prosody = synthesis.agent_voice_prosody() if own else synthesis.random_caller_prosody(rng)
            item = speak(espeak, text, rng, voice, labels, prosody)
            words = plain_words(text)
            if item is not None and words and item.waveform.size < 14 * RATE_HZ:
                item.text = words
                yield item


def write_shard(path: Path, items: Iterable[Utterance], rng: Generator, telephone_share: float, hours: float) -> None:
    """Degrade, extract features, store; stops after `hours`."""
    features, texts, phonemes, tags, human = [], [], [], [], []
    seconds = 0.0
    for item in items:
        wave = channel.degrade(item.waveform, rng, rng.random() < telephone_share)
        frames = fbank(torch.from_numpy(wave)).numpy().astype(np.float16)
        count = -(-len(frames) // 4)
        features.append(frames)
        texts.append(item.text)
        phonemes.append(item.phonemes[:count] if item.phonemes is not None else np.full(count, UNKNOWN, np.int16))
        tags.append(item.tags)
        human.append(item.is_human)
        seconds += len(wave) / RATE_HZ
        if seconds >= hours * 3600:
            break
    temporary = path.with_suffix(".tmp.npz")
    np.savez(
        temporary,
        features=np.concatenate(features),
        starts=np.cumsum([0] + [len(f) for f in features]),
        texts=np.array(texts),
        phonemes=np.concatenate(phonemes),
        phoneme_starts=np.cumsum([0] + [len(p) for p in phonemes]),
        tags=np.array(tags, np.int8),
        human=np.array(human),
    )
    temporary.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--speech-dir", type=Path)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--hours", type=float, default=1.5)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument(
        "--open-share", type=float, default=1.0, help="share kept of sentences outside the callers' phrases"
    )
    parser.add_argument("--agent", action="store_true", help="agent sentences, half of them in the agent's own voice")
    parser.add_argument("--name", default="train")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.work_dir / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(arguments.shards):
        path = folder / f"{arguments.name}_{index:03d}.npz"
        if path.exists():
            continue
        started = time.monotonic()
        if arguments.agent:
            seed = arguments.first_seed + index
            sentences = agent_sentences(seed, arguments.work_dir, "train", own_voice_share=0.5)
            write_shard(path, sentences, np.random.default_rng(seed), 0.5, arguments.hours)
            continue
        build_shard(path, arguments.first_seed + index, arguments.hours, arguments.work_dir, arguments.speech_dir,
                    arguments.held_out, human_share=0.0 if arguments.held_out else 0.28,
                    open_share=arguments.open_share)  # fmt: skip
        print(f"{path.name}: {arguments.hours} h in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
