"""The media worker process for AudioSocket: TCP connections of an Asterisk on one side, the agent's socket and rings
on the other.

    python -m telephony.audiosocket.worker --socket DIR/audiosocket.sock --checks DIR/audiosocket-check.sock
                                           [--config JSON] [--parent-pid PID]

--config: {"telephony": {...}, "audiosocket": {...}}. Prints one JSON line on stdout when it takes calls. Signals, the
agent's death and the parent's death mean the same as for the SIP worker (telephony/loop_worker.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from telephony.audiosocket.config import AudioSocketConfig, media_config
from telephony.audiosocket.endpoint import AudioSocketEndpoint
from telephony.config import TelephonyConfig
from telephony.loop_worker import LoopWorker
from telephony.priority import run_first
from telephony.webrtc.signaling import serve_checks


async def run(config: TelephonyConfig, settings: AudioSocketConfig, options: argparse.Namespace, ran_as: str) -> None:
    worker: LoopWorker[AudioSocketEndpoint] = LoopWorker(
        config, options.socket, options.parent_pid,
        lambda sink, admission: AudioSocketEndpoint(
            config, settings, sink, admission, lambda event: worker.tell(event)
        ),
    )  # fmt: skip
    await worker.run([await worker.calls.listen(), await serve_checks(options.checks)], ran_as)
    options.checks.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="telephony.audiosocket.worker", description="media worker for AudioSocket")
    parser.add_argument("--socket", required=True, type=Path, help="where the agent connects")
    parser.add_argument("--checks", required=True, type=Path, help="where it says that it is there")
    parser.add_argument("--config", default="{}", help='{"telephony": {...}, "audiosocket": {...}}')
    parser.add_argument("--parent-pid", type=int, default=os.getppid())
    options = parser.parse_args(arguments)
    scheduling = run_first()
    try:
        table = json.loads(options.config)
        settings = AudioSocketConfig(**table.get("audiosocket", {}))
        asyncio.run(run(media_config(TelephonyConfig(**table.get("telephony", {}))), settings, options, scheduling))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"telephony.audiosocket.worker: {error}")
    options.socket.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
