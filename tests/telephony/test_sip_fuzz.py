"""One seed of the fuzz: after hundreds of messages bent out of valid ones, the worker's process is the same, the live
call carries audio both ways, and a new call is answered.

More seeds: `python -m tests.telephony.sip_fuzz --seeds 1-10 --seconds 60`."""

from __future__ import annotations

import pytest

pytest.importorskip("pjsua2")

from tests.telephony.sip_fuzz import run  # noqa: E402

_FUZZ_S = 12


@pytest.mark.slow
async def test_worker_outlives_what_a_listed_source_can_send():
    verdict = await run(seed=1, seconds=_FUZZ_S)
    assert verdict.num_sent > 100
    assert verdict.is_good, f"{verdict}\n{verdict.stderr}\n" + "\n----\n".join(verdict.last[-6:])
