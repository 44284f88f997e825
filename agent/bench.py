"""`minmo bench [model] [media]`: what the model costs and how steady the media are; the last line is one JSON object.
`minmo bench engine|parents|gpu [options]` runs one of minmo_runtime's benches with its own options, e.g.
`minmo bench engine --profile minmo-8b --random-weights --calls 1,8,32,64,128,256`; so does `minmo bench media
--ramp|--browsers|--delay ...`, and `minmo bench soak`: does anything grow with the calls (agent/bench_soak.py).

Each part runs in a process of its own, because frame gaps must not be measured beside torch's threads. The parts stand
in minmo_runtime/bench (real-time factors, first audio) and agent/bench_media.py (frame gaps under load).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from agent.checkpoint import checkpoint_folder
from agent.config import Config

PARTS = ("model", "media")
MODULES = {
    "engine": "minmo_runtime.bench.engine",
    "parents": "minmo_runtime.bench.parents",
    "gpu": "minmo_runtime.bench.gpu",
    "answers": "agent.bench_answers",
    "media": "agent.bench_media",
    "soak": "agent.bench_soak",
}


def commands(config: Config) -> dict[str, list[str]]:
    """Part -> arguments of Python. Without a trained checkpoint the weights are random, which cost the same."""
    folder = checkpoint_folder(config)
    checkpoint = ["--checkpoint", str(folder)] if (folder / "checkpoint.toml").is_file() else []
    return {
        "model": ["-m", "minmo_runtime.bench.engine", *checkpoint],
        "media": ["-m", "agent.bench_media"],
    }


def run_bench(config: Config, words: Sequence[str]) -> int:
    """Exit status 0 when every part ended well and its last line was JSON; ValueError for what there is not."""
    first_option = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    parts, options = words[:first_option], words[first_option:]
    if len(parts) == 1 and parts[0] in MODULES and (options or parts[0] not in PARTS):
        return subprocess.run([sys.executable, "-m", MODULES[parts[0]], *options], check=False).returncode
    for unknown in (*(part for part in parts if part not in PARTS), *options):
        raise ValueError(f"{unknown}: must be {' or '.join(PARTS)}, or one of {', '.join(MODULES)} with its options")
    results: dict[str, Any] = {}
    for part in parts or PARTS:
        results[part] = _run([sys.executable, *commands(config)[part]])
    print(json.dumps(results))
    return 0 if all(results.values()) else 1


def _run(command: list[str]) -> Any:
    """The part's last line as JSON, its other lines passed on; None when it failed."""
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if last:
                print(last, flush=True)
            last = line.rstrip("\n")
    try:
        return json.loads(last) if process.returncode == 0 else None
    except json.JSONDecodeError:
        print(last)
        return None
