"""Notices that the agent's event loop stands still, and names the function that holds it.

Every call of the process lives on that one loop: code that blocks it makes all of them deaf and mute, and nothing on
the loop could say so. So the loop beats, and a thread that sees no beat for `agent.loop_stall_s` looks at what the
loop's thread is doing at that moment (sys._current_frames). Bounded: one report a stall, at most MAX_REPORTS a minute,
MAX_FRAMES frames each. Not every standstill is a function's fault: how much of it the loop's thread waited for a CPU
is told beside it (Linux: /proc, schedstat), and when the watching thread was as late itself, nothing is said.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)
BEAT_S = 0.05
MAX_FRAMES = 12
MAX_REPORTS, REPORTS_WINDOW_S = 10, 60.0
LAG_WINDOW_S = 60.0
_OURS = str(Path(__file__).resolve().parent.parent)


class LoopWatch:
    """`start()` on the loop's own thread, `stop()` there too. `report` gets the words: by default the log."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self.num_stalls = 0
        self._beat_at_s = time.monotonic()  # written by the loop, read by the thread
        self._reported_at_s = 0.0  # the beat after which the running stall was reported; 0 = none runs
        self._lags: deque[tuple[float, float]] = deque()  # (when, lag), falling: the first is the worst
        self._reports: deque[float] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = threading.Event()
        self._loop_thread_id = 0
        self._cpu_wait: Path | None = None
        self._cpu_waited_s = 0.0  # when the thread last saw a new beat

    def start(self) -> None:
        self._loop_thread_id = threading.get_ident()
        self._cpu_wait = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._beat_at_s = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(BEAT_S, self._beat)
        threading.Thread(target=self._watch, name="loop-watch", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        if self._timer is not None:
            self._timer.cancel()

    @property
    def worst_lag_s(self) -> float:
        """How late the loop was, at most, in the last minute; asked on the loop."""
        self._forget(time.monotonic())
        return self._lags[0][1] if self._lags else 0.0

    # ------------------------------------------------------------------- the loop

    def _beat(self) -> None:
        now_s = time.monotonic()
        lag_s = max(0.0, now_s - self._beat_at_s - BEAT_S)
        self._forget(now_s)
        while self._lags and self._lags[-1][1] <= lag_s:
            self._lags.pop()
        self._lags.append((now_s, lag_s))
        if self._reported_at_s == self._beat_at_s:
            log.error("the event loop goes on after %.1f s", lag_s)
        self._beat_at_s = now_s
        self._timer = asyncio.get_running_loop().call_later(BEAT_S, self._beat)

    def _forget(self, now_s: float) -> None:
        while self._lags and now_s - self._lags[0][0] > LAG_WINDOW_S:
            self._lags.popleft()

    # ----------------------------------------------------------------- the thread

    def _watch(self) -> None:
        pause_s = self._stall_s / 4
        looked_at_s, seen_beat_at_s = time.monotonic(), 0.0
        while not self._stopping.wait(pause_s):
            now_s, beat_at_s = time.monotonic(), self._beat_at_s
            if beat_at_s != seen_beat_at_s:
                seen_beat_at_s, self._cpu_waited_s = beat_at_s, self._waited_for_cpu_s()
            was_late, looked_at_s = now_s - looked_at_s > self._stall_s, now_s
            if was_late or now_s - beat_at_s < self._stall_s or self._reported_at_s == beat_at_s:
                continue
            frame = sys._current_frames().get(self._loop_thread_id)
            if frame is None or self._beat_at_s != beat_at_s:
                continue  # it went on this very moment
            self._reported_at_s = beat_at_s
            self.num_stalls += 1
            if self._may_report(now_s):
                log.error(
                    "the event loop stands still for %.1f s (%.1f s of it without a CPU), held by %s\n%s",
                    now_s - beat_at_s, self._waited_for_cpu_s() - self._cpu_waited_s, *told(frame),
                )  # fmt: skip

    def _waited_for_cpu_s(self) -> float:
        """How long the loop's thread was ready to run and did not, since it began; 0 where the kernel does not say."""
        try:
            return int(self._cpu_wait.read_text().split()[1]) / 1e9 if self._cpu_wait else 0.0
        except (OSError, IndexError, ValueError):
            return 0.0

    def _may_report(self, now_s: float) -> bool:
        while self._reports and now_s - self._reports[0] > REPORTS_WINDOW_S:
            self._reports.popleft()
        if len(self._reports) >= MAX_REPORTS:
            return False
        self._reports.append(now_s)
        return True


def told(frame: FrameType) -> tuple[str, str]:
    """Which function of ours holds the loop (else the innermost of any), and the innermost frames."""
    stack = traceback.extract_stack(frame)
    ours = [entry for entry in stack if entry.filename.startswith(_OURS) and "site-packages" not in entry.filename]
    culprit = (ours or stack)[-1]
    name = f"{culprit.name} ({culprit.filename.removeprefix(_OURS).lstrip('/')}:{culprit.lineno})"
    return name, "".join(traceback.format_list(stack[-MAX_FRAMES:])).rstrip()
