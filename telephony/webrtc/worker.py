"""The media worker process for browsers: aiortc on one side, the agent's socket and rings on the other.

    python -m telephony.webrtc.worker --socket DIR/webrtc-0.sock --offers DIR/offers-0.sock [--config JSON]
                                      [--parent-pid PID]

--config: {"telephony": {...}, "webrtc": {...}}. Prints one JSON line on stdout when it takes calls. Signals, the
agent's death and the parent's death mean the same as for the SIP worker (telephony/media_worker.py). What it does not
know: HTTP, tokens, the page; offers come by Unix socket from the page's server (signaling.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from telephony.config import TelephonyConfig
from telephony.holdings import told
from telephony.media_worker import Admission, MediaWorker, Sink
from telephony.priority import run_first
from telephony.webrtc.config import WebRtcConfig, media_config
from telephony.webrtc.endpoint import WebRtcEndpoint
from telephony.webrtc.ice import MediaLoop, gather_only_on
from telephony.webrtc.signaling import serve_offers

_STEP_S = 0.01
_GOODBYE_S = 1.0
_SWITCH_S = 0.0005  # decoders and encoders are threads: at the usual 5 ms each would make the clock late by so much


class BrowserWorker(MediaWorker):
    """A worker whose calls are WebRTC connections."""

    def __init__(self, config: TelephonyConfig, settings: WebRtcConfig, socket_path: Path, parent_pid: int) -> None:
        self._settings = settings
        super().__init__(config, socket_path, parent_pid, self._make_endpoint)

    def _make_endpoint(self, sink: Sink, admission: Admission) -> WebRtcEndpoint:
        self._browsers = WebRtcEndpoint(self.config, self._settings, sink, admission)
        return self._browsers

    def counts(self) -> dict[str, int]:
        """What is held for calls, for whoever looks for a leak."""
        return super().counts() | {"tasks": len(asyncio.all_tasks())}

    async def run(self, offers: Path, ready: str) -> None:
        """Until told to stop."""
        server = await serve_offers(offers, self._browsers.on_offer)
        clock = asyncio.create_task(self._browsers.run_clock(), name="worker/clock")
        print(ready, flush=True)
        loop = asyncio.get_running_loop()
        try:
            while not self.is_over:
                self.step(loop.time())
                await asyncio.sleep(_STEP_S)
        finally:
            self.finish()
            clock.cancel()
            server.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._browsers.closed(), _GOODBYE_S)
            offers.unlink(missing_ok=True)


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
            worker = BrowserWorker(config, settings, options.socket, options.parent_pid)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, worker.on_signal)
            signal.signal(signal.SIGUSR1, lambda _number, _frame: print(told(worker.counts()), flush=True))
            ready = {"ready": True, "max_calls": settings.max_calls, "pid": os.getpid(), "scheduling": scheduling}
            await worker.run(options.offers, json.dumps(ready))

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
