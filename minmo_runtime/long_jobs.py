"""Jobs that ran longer than `runtime.max_job_ms`: named in the log with their part, and counted for the calls they
held up.

One pass of a module cannot be cut short from outside, so the bound is a promise that is watched, not a limit that is
enforced: what breaks it is named, and a figure of every call that shared the job. Knows no clock: the engine says how
long a job took. Walk: step 7.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

LOG_EVERY_S = 10.0  # at most one line in that time for each part: an engine that is late has no time to tell it


@dataclass
class _OfOnePart:
    num_jobs: int = 0
    longest_ms: float = 0.0
    logged_at: float = float("-inf")


@dataclass
class LongJobs:
    """Owned by the engine."""

    max_job_ms: float
    by_part: dict[str, _OfOnePart] = field(default_factory=dict)

    @property
    def num_jobs(self) -> int:
        return sum(part.num_jobs for part in self.by_part.values())

    def note(self, part: str, num_rows: int, seconds: float, now: float) -> bool:
        """Whether the job was too long."""
        spent_ms = 1000 * seconds
        if spent_ms <= self.max_job_ms:
            return False
        known = self.by_part.setdefault(part, _OfOnePart())
        known.num_jobs += 1
        known.longest_ms = max(known.longest_ms, spent_ms)
        if now - known.logged_at >= LOG_EVERY_S:
            known.logged_at = now
            print(
                f"engine: {part} of {num_rows} calls took {spent_ms:.0f} ms, longer than max_job_ms {self.max_job_ms:g}"
                f" ({known.num_jobs} so far, longest {known.longest_ms:.0f} ms)",
                file=sys.stderr,
            )
        return True

    def clear(self) -> None:
        self.by_part.clear()
