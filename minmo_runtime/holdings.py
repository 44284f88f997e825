"""What this process holds, counted from inside, as one JSON line: asked for with SIGUSR1 by whoever looks for a leak.

Counting walks every object that Python tracks and collects garbage first: some 100 ms in which nothing else runs, so it
is asked for between calls. From outside (memory, descriptors, threads): agent/growth.py. Its twin is
telephony/holdings.py, for islands never import each other.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Mapping

MOST_TYPES = 60  # the line must fit a pipe's 64 KiB


def told(counts: Mapping[str, int]) -> str:
    """`counts`: what the process knows of itself, e.g. its open streams. The number of all objects stands beside
    them, and the most frequent types, by which a growth is named."""
    gc.collect()
    types = Counter(type(held).__name__ for held in gc.get_objects())
    return json.dumps({"holds": {**counts, "objects": types.total()}, "types": dict(types.most_common(MOST_TYPES))})
