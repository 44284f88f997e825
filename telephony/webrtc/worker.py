"""The media worker process for browsers: aiortc on one side, the agent's socket and rings on the other.

    python -m telephony.webrtc.worker --socket DIR/webrtc-0.sock --offers DIR/offers-0.sock [--config JSON]
                                      [--parent-pid PID]

--config: {"telephony": {...}, "webrtc": {...}}. Prints one JSON line on stdout when it takes calls. Signals, the
agent's death and the parent's death mean the same as for the SIP worker (telephony/loop_worker.py). What it does not
know: HTTP, tokens, the page; offers come by Unix socket from the page's server (signaling.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from telephony.config import TelephonyConfig
from telephony.loop_worker import LoopWorker
from telephony.priority import run_first
from telephony.webrtc.config import WebRtcConfig, media_config
from telephony.webrtc.endpoint import WebRtcEndpoint
from telephony.webrtc.ice import MediaLoop, gather_only_on
from telephony.webrtc.signaling import serve_offers

_SWITCH_S = 0.0005  # decoders and encoders are threads: at the usual 5 ms each would make the clock late by so much


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="telephony.webrtc.worker", description="media worker for browsers")
    parser.add_argument("--socket", required=True, type=Path, help="where the agent connects")
    parser.add_argument("--offers", required=True, type=Path, help="where the page's server brings offers")
    parser.add_argument("--config", default="{}", help='{"telephony": {...}, "webrtc": {...}}')
    parser.add_argument("--parent-pid", type=int, default=os.getppid())
    options = parser.parse_args(arguments)
    scheduling = run_first()
    sys.setswitchinterval(_SWITCH_S)
    try:
        table = json.loads(options.config)
        settings = WebRtcConfig(**table.get("webrtc", {}))
        config = media_config(TelephonyConfig(**table.get("telephony", {})))
        gather_only_on(settings.bind)

        async def run() -> None:
            worker = LoopWorker(
                config, options.socket, options.parent_pid,
                lambda sink, admission: WebRtcEndpoint(config, settings, sink, admission),
            )  # fmt: skip
            await worker.run([await serve_offers(options.offers, worker.calls.on_offer)], scheduling)
            options.offers.unlink(missing_ok=True)

        with asyncio.Runner(
            loop_factory=lambda: MediaLoop(settings.bind, settings.port_first, settings.port_last)
        ) as runner:
            runner.run(run())
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"telephony.webrtc.worker: {error}")
    options.socket.unlink(missing_ok=True)
    sys.stderr.flush()
    os._exit(0)  # aiortc's threads must not hold the exit up


if __name__ == "__main__":
    main()
