"""A parent process with the fake engine, to be killed: prints its children's pids and waits.

python tests/live/small_parent.py FOLDER
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from agent.app import Stack
from agent.config import Config, load_config

FAKE_ENGINE = (str(Path(__file__).with_name("fake_engine.py")),)
CHECKPOINT = """
name = "fake"
[facts]
languages = ["en"]
dialects = ["us"]
emotions = ["calm", "brisk", "neutral"]
rates = ["normal"]
voices = ["agent"]
"""


def fake_config(folder: Path) -> Config:
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "checkpoint.toml").write_text(CHECKPOINT)
    return load_config(
        None,
        {
            # Tests share their cores: a loop that stands still for a moment is nothing to complain about.
            "agent": {"checkpoint": str(checkpoint), "log_level": "warning", "loop_stall_s": 30.0},
            "telephony": {"sip_port": 0},
            "web": {"port": 0},
            "storage": {"folder": str(folder / "var")},
        },
    )


async def main() -> None:
    async with Stack(fake_config(Path(sys.argv[1])), has_web=False, engine_command=FAKE_ENGINE) as stack:
        print(*(child.pid for child in stack.children.values()), flush=True)
        await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(main())
