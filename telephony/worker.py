"""The SIP media worker process: pjsua2 on one side, the agent's socket and rings on the other; SIP and media and
nothing else.

    python -m telephony.worker --socket DIR/media.sock [--config JSON | --config-file FILE] [--parent-pid PID]

Prints one JSON line on stdout when it takes calls: {"ready": true, "sip_address": …, "sip_port": …, "max_calls": …, …}.
SIGTERM: no new calls, wait for the last (at most drain_s), exit; a second SIGTERM, or a parent that is gone: BYE at
once and exit within 5 s. The agent's death ends no call (agent_watch.py). One loop; time enters here and is handed
down.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from telephony.config import TelephonyConfig
from telephony.holdings import told
from telephony.media_worker import Admission, MediaWorker, Sink
from telephony.priority import run_first
from telephony.sip.endpoint import SipEndpoint, SipError
from telephony.wire import SecurityEvent, TrunkChanged

_TICK_MS = 20


class Worker(MediaWorker):
    """A worker whose calls are SIP dialogs."""

    def __init__(self, config: TelephonyConfig, socket_path: Path, parent_pid: int) -> None:
        self._trunk_states: dict[str, TrunkChanged] = {}  # told to every new agent
        self._is_started = False
        super().__init__(config, socket_path, parent_pid, self._make_endpoint)
        self._is_started = True

    def _make_endpoint(self, sink: Sink, admission: Admission) -> SipEndpoint:
        self._sip = SipEndpoint(self.config, sink, admission, self._notify)
        return self._sip

    def _notify(self, message: TrunkChanged | SecurityEvent) -> None:
        """News that belongs to no leg: to the agent, and one line for the operator's log."""
        print(f"worker: {message}", file=sys.stderr)
        if isinstance(message, TrunkChanged):
            self._trunk_states[message.trunk] = message
        if self._is_started:
            self._link.send(message)

    def _admission(self) -> int:
        return super()._admission() or (503 if self._sip.num_calls >= self._sip.max_calls else 0)

    @property
    def is_over(self) -> bool:
        """Parties that were joined go on talking until the time to drain is over."""
        is_ended = self._stop_until_s is not None and self._now_s > self._stop_until_s
        return super().is_over and (is_ended or not self._sip.bridges)

    def greet(self) -> None:
        super().greet()
        for message in self._trunk_states.values():
            self._link.send(message)

    def counts(self) -> dict[str, int]:
        """What is held for calls, for whoever looks for a leak."""
        return super().counts() | {"dialogs": self._sip.num_held}

    def run(self) -> None:
        """Until told to stop. Signalling is at most `_TICK_MS` late; media never waits for this loop."""
        while not self.is_over:
            now_s = time.monotonic()
            self._sip.poll(now_s, _TICK_MS)
            self.step(now_s)
        self.finish()


def _stdout_to(path: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.dup2(fd, 1)
    os.close(fd)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="telephony.worker", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--socket", required=True, type=Path)
    parser.add_argument("--config", default="", help="settings of [telephony] as a JSON object")
    parser.add_argument("--config-file", type=Path, help="the same, in a file")
    parser.add_argument("--parent-pid", type=int, default=os.getppid())
    options = parser.parse_args(arguments)
    text = options.config_file.read_text() if options.config_file else options.config
    scheduling = run_first()
    ready_out = os.dup(1)
    _stdout_to(os.devnull)  # pjlib greets on stdout before its log level can be set
    try:
        config = TelephonyConfig(**(json.loads(text) if text else {}))
        worker = Worker(config, options.socket, options.parent_pid)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"telephony.worker: {error}")
    except SipError as error:
        print(f"telephony.worker: SIP did not start: {error.info(False)}", file=sys.stderr)
        os._exit(1)
    os.dup2(2, 1)  # from here on pjsip's errors belong to stderr; our stdout was for the ready line only
    signal.signal(signal.SIGTERM, worker.on_signal)
    signal.signal(signal.SIGINT, worker.on_signal)
    signal.signal(signal.SIGUSR1, lambda _number, _frame: os.write(ready_out, f"{told(worker.counts())}\n".encode()))
    hello = worker.hello
    ready = {
        "ready": True, "sip_address": hello.sip_address, "sip_port": hello.sip_port, "max_calls": hello.max_calls,
        "pid": hello.worker_pid, "socket": str(options.socket), "scheduling": scheduling,
    }  # fmt: skip
    os.write(ready_out, (json.dumps(ready) + "\n").encode())
    worker.run()
    options.socket.unlink(missing_ok=True)
    sys.stderr.flush()
    os._exit(0)  # pjsua2's own destruction order is not to be relied on


if __name__ == "__main__":
    main()
