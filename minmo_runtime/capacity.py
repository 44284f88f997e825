"""How many calls this device holds in real time: measured once on the loaded weights, or stated in config.

The self-test is short: one call, then several at once, listen to one second and say one sentence each; what counts is
seconds of work per second of audio. Between the two a straight line: passes are shared, so each further call costs
less than the first. A call speaks 45 % of the time and listens to speech half of it; the device holds as many calls as
keep it busy for at most `MAX_BUSY_SHARE`, because what waits in line grows without bound as that goes to 1. The result
is kept in a file, by device, settings and weights. A CPU with one thread is measured in its thread's own time, so that
another process that runs meanwhile does not look like a slow device. Walk: before step 7. Knows no calls that are real.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from minmo_runtime.api import (
    INPUT_SAMPLE_RATE_HZ,
    AudioDelta,
    CloseStream,
    OpenStream,
    PushAudio,
    RuntimeEvent,
    RuntimeRequest,
    Say,
)
from minmo_runtime.checkpoint_contents import part_path, parts, read_contents
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.profiles import Files, models_folder
from minmo_runtime.stream import Stream
from minmo_runtime.weights import Checkpoint

SPEAKING_SHARE = 0.45  # of a call's time; the goals of design §7 and the benches count the same
LISTENING_SHARE = 0.5  # the caller's own speech; silence never reaches the encoder
MAX_BUSY_SHARE = 0.75
TEST_ROWS = {"cpu": 4, "cuda": 16}
HEARD_S = 1.0
SENTENCE = "your order was shipped"
SYSTEM = "you are mia at the garden shop. speak in a friendly voice at a normal pace. order numbers have 5 digits."
_VERSION = 1  # of the self-test: another one is another figure


@dataclass(frozen=True)
class Costs:
    """Seconds of work per second of audio: of one call alone, and of `rows` calls together (all of them in sum)."""

    rows: int
    listening: tuple[float, float]
    speaking: tuple[float, float]

    def busy_share(self, num_calls: int) -> float:
        """Of the device's time, with that many calls. Example: 0.02 and 0.05 for 1 and 4 listening calls are 0.01 for
        being at it at all and 0.01 for each."""
        return self._work(self.listening, LISTENING_SHARE * num_calls) + self._work(
            self.speaking, SPEAKING_SHARE * num_calls
        )

    def _work(self, measured: tuple[float, float], num_at_once: float) -> float:
        alone, together = measured
        each = max(0.0, together - alone) / (self.rows - 1) if self.rows > 1 else alone
        return max(0.0, alone - each) * min(1.0, num_at_once) + each * num_at_once

    def calls_held(self, at_most: int) -> int:
        """0 where not even one call is held."""
        for num_calls in range(1, at_most + 1):
            if self.busy_share(num_calls) > MAX_BUSY_SHARE:
                return num_calls - 1
        return at_most


@dataclass(frozen=True)
class Capacity:
    """How many calls are let in, and where that figure comes from."""

    num_calls: int
    source: str  # config | measured | kept
    costs: Costs | None = None

    def __str__(self) -> str:
        if self.costs is None:
            return f"{self.num_calls} calls, as stated in runtime.capacity_calls"
        costs = self.costs
        return (
            f"{self.num_calls} calls in real time ({self.source}: work per second of audio "
            f"{costs.listening[0]:.3f} s listening and {costs.speaking[0]:.3f} s speaking for one call, "
            f"{costs.listening[1]:.3f} s and {costs.speaking[1]:.3f} s for {costs.rows})"
        )


class Measured(Protocol):
    """What the self-test asks of an engine (engine.py asks this file how many calls it may take)."""

    checkpoint: Checkpoint
    config: RuntimeConfig
    streams: dict[str, Stream]
    say_cache: dict
    timer: Callable[[], float] | None

    def receive(self, request: RuntimeRequest, now: float) -> list[RuntimeEvent]: ...

    def step(self, now: float) -> list[RuntimeEvent]: ...

    def has_work(self, now: float) -> bool: ...


def capacity_of(engine: Measured, kept_in: Path | None = None, timer: Callable[[], float] | None = None) -> Capacity:
    """What config states; else what was kept of this device and these weights; else measured now, and kept.

    `engine` must hold no call. At least one call is always let in: an engine for nobody is of no use.
    """
    config = engine.config
    if config.capacity_calls:
        return Capacity(min(config.capacity_calls, config.max_streams), "config")
    path, key = kept_in or default_file(), identity(engine.checkpoint.folder, config)
    costs, source = kept(path, key), "kept"
    if costs is None:
        costs, source = measure(engine, timer or _timer_for(config)), "measured"
        keep(path, key, costs)
    return Capacity(max(1, costs.calls_held(config.max_streams)), source, costs)


def measure(engine: Measured, timer: Callable[[], float]) -> Costs:
    """The self-test. Leaves the engine as it was."""
    assert not engine.streams, f"calls are open: {sorted(engine.streams)}"
    rows = min(TEST_ROWS[engine.config.device], engine.config.max_streams)
    watched_by, engine.timer = engine.timer, None  # the first pass of anything is long
    one = several = _work_of(engine, 1, timer)
    if engine.config.device == "cuda" or Costs(1, (one[0],) * 2, (one[1],) * 2).calls_held(1):
        one = _work_of(engine, 1, timer)  # again: memory and kernels were chosen at first use
        several = _work_of(engine, rows, timer) if rows > 1 else one
    else:
        rows = 1  # not even one call in real time: no need to wait for more
    engine.say_cache.clear()
    engine.timer = watched_by
    return Costs(rows, (one[0], several[0]), (one[1], several[1]))


def _work_of(engine: Measured, num_calls: int, timer: Callable[[], float]) -> tuple[float, float]:
    """Seconds of work per second of audio, listening and speaking, of so many calls at once."""
    names = [f"self-test-{index}" for index in range(num_calls)]
    speech = np.random.default_rng(0).normal(0, 2000, round(HEARD_S * INPUT_SAMPLE_RATE_HZ)).astype("<i2").tobytes()
    engine.say_cache.clear()  # a sentence that was said before costs nothing
    for name in names:
        engine.receive(OpenStream(call_id=name, system_prompt=SYSTEM), 0.0)
    _finish(engine)
    begin = timer()
    for name in names:
        engine.receive(PushAudio(call_id=name, pcm=speech, start_sample=0, voiced=True), 0.0)
    _finish(engine)
    heard_in = timer() - begin
    for index, name in enumerate(names):
        engine.streams[name].needs_hidden = True  # through the LLM, as a reply
        engine.receive(Say(call_id=name, turn_id="t", text=f"{SENTENCE} {index}"), 0.0)
    begin = timer()
    num_samples = _finish(engine)
    spoken_in = timer() - begin
    for name in names:
        engine.receive(CloseStream(call_id=name), 0.0)
    spoken_s = num_samples / num_calls / engine.checkpoint.rates.output_sample_rate_hz
    return heard_in / HEARD_S, spoken_in / max(spoken_s, 0.1)


def _finish(engine: Measured) -> int:
    """Everything that can be done; returns the samples that were made."""
    num_samples = 0
    while engine.has_work(0.0):
        num_samples += sum(len(event.pcm) // 2 for event in engine.step(0.0) if isinstance(event, AudioDelta))
    return num_samples


def _timer_for(config: RuntimeConfig) -> Callable[[], float]:
    return time.thread_time if config.device == "cpu" and config.num_threads == 1 else time.perf_counter


# ------------------------------------------------------------------- what is kept


def default_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minmo" / "capacity.json"


def identity(folder: Path, config: RuntimeConfig) -> str:
    """Of this device, these settings and these weights: their hashes where the checkpoint states them, else size and
    date of the files."""
    contents = read_contents(folder)
    files = Files(folder, models_folder(config.models_folder))
    stats = []
    for part in parts():
        path = part_path(files, contents, part)
        is_told = "sha256" in contents.get("files", {}).get(part, {})
        if part in contents and not is_told and path.is_file():
            stats.append((part, path.stat().st_size, path.stat().st_mtime_ns))
    settings: dict[str, Any] = asdict(config)
    for name in ("profile", "models_folder", "max_streams", "capacity_calls", "draft_probability"):
        del settings[name]  # they change nothing of a job's cost
    device = torch.cuda.get_device_name() if config.device == "cuda" else f"{_cpu_name()}, torch {torch.__version__}"
    told = json.dumps([_VERSION, device, settings, contents, stats], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{platform.node()}, {names[0] if names else platform.machine()}"


def kept(path: Path, key: str) -> Costs | None:
    """None for a file that is not there or says something else: then it is measured again."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))[key]
        listening, speaking = ((float(a), float(b)) for a, b in (entry["listening"], entry["speaking"]))
        return Costs(int(entry["rows"]), listening, speaking)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(path: Path, key: str, costs: Costs) -> None:
    """Beside what other devices and weights gave. A folder that cannot be written is no reason not to start."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    entries = {**(known if isinstance(known, dict) else {}), key: asdict(costs)}
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        print(f"engine: {path}: {error.strerror}: the measured capacity is not kept", file=sys.stderr)
