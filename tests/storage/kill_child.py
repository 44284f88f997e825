"""A process of its own, started by test_kill.py: on each line of stdin it forks a writer that stores calls as fast as
it can.

The writer says on stdout what was acknowledged, a line each, until it is killed; then this process says "dead". Forking
from a process that has imported everything makes a thousand deaths affordable.
"""

from __future__ import annotations

import datetime as dt
import itertools
import os
import sys
from pathlib import Path

from storage.calls import CallStore
from storage.config import StorageConfig


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # one write, below PIPE_BUF: never half a line


def write_calls(folder: Path, run: str) -> None:
    now = dt.datetime(2026, 11, 22, 16, 0, tzinfo=dt.UTC)
    store = CallStore(StorageConfig(folder=folder, journal_reserve_mib=0, group_commit_ms=5))
    store.close_orphans()
    say("ready")
    for number in itertools.count():
        call_id = f"r{run}c{number}"
        store.open_call(call_id, did="100", ani="", now=now)
        say(f"open {call_id}")
        for turn in range(6):
            store.append_turn(call_id, f"t{turn}", role="caller", heard_text=f"{call_id} {turn}", now=now)
            say(f"turn {call_id} {turn}")
            store.journal_append(call_id, "floor", now=now, turn=turn)
            say(f"event {call_id} {turn}")
        store.close_call(call_id, disposition="completed", cause="normal", now=now)
        say(f"close {call_id}")


def main(folder: Path) -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            write_calls(folder, line.strip())
        say(f"pid {pid}")
        os.waitpid(pid, 0)
        say("dead")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
