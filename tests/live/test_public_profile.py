"""A call over SIP through all three bridges: tiny random weights in the parents' own formats, the whole stack."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest
import soundfile

pytest.importorskip("pjsua2")

from agent.app import Stack  # noqa: E402
from agent.caller import call_once  # noqa: E402
from agent.config import load_config  # noqa: E402
from storage.config import StorageConfig  # noqa: E402
from storage.search import CallReader  # noqa: E402
from tests.live.sip_agent import RATE, write_wav  # noqa: E402
from tests.live.stack import REPOSITORY  # noqa: E402
from tests.minmo_runtime.public_files import write_public_checkpoint  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.slow]


async def test_a_sip_call_through_the_bridges_is_heard_spoken_to_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr("agent.app.RENDER_WITHIN_S", 900.0)  # a busy machine, and nothing here is about time
    folder, models = write_public_checkpoint(tmp_path)
    overrides = {
        "agent": {"log_level": "warning"},
        "runtime": {"profile": str(folder), "models_folder": str(models), "max_streams": 3, "max_voice_tokens": 50},
        "telephony": {"sip_port": 0},
        "storage": {"folder": tmp_path / "var"},
    }
    noise = np.random.default_rng(0).normal(0, 4000, 2 * RATE).astype(np.int16)
    write_wav(tmp_path / "say.wav", noise)
    async with Stack(load_config(None, overrides), has_web=False) as stack:
        said = asyncio.to_thread(
            call_once,
            f"sip:100@{stack.sip_address}",
            play=tmp_path / "say.wav",
            record=tmp_path / "both.wav",
            max_duration_s=45.0,
        )
        result = await asyncio.wait_for(said, 200)
    with contextlib.closing(CallReader.open(StorageConfig(folder=tmp_path / "var"))) as reader:
        row = reader.list_calls(limit=1)[0]
        call = reader.get_call(row["call_id"])
    assert call["bridges"] == ["in", "out", "duplex"] and call["checkpoint"] == "minmo-8b", call
    # Random weights say nothing; the fixed sentences are spoken by the random voice through the bridge.
    assert any(turn["role"] == "agent" and turn["heard_text"] for turn in call["turns"]), call["turns"]
    sound, _ = soundfile.read(str(tmp_path / "both.wav"), dtype="int16", always_2d=True)
    assert np.abs(sound[:, 1].astype(int)).max() > 50, result  # the agent's side, as the caller recorded it
