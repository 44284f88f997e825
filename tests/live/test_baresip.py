"""baresip (apt: baresip-core) calls us: speech both ways, keys, hold, and a blind transfer that it carries out."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pjsua2")

from tests.live.sip_agent import (  # noqa: E402
    RATE,
    loud_seconds,
    read_wav,
    similarity,
    tone_agent,
    until,
    warble,
    write_wav,
)
from tests.live.stack import whole_stack  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.peers("baresip")]

MODULES = "/usr/lib/baresip/modules"
CONFIG = """
poll_method epoll
sip_listen 127.0.0.1:{port}
net_interface 127.0.0.1
call_local_timeout 120
call_max_calls 4
audio_source aufile,{source}
audio_player aufile,{folder}/unused.wav
snd_path {folder}
rtp_timeout 0
jitter_buffer_delay 1-3
rtp_ports 20000-40000
module_path {modules}
module stdio.so
module g711.so
module aufile.so
module sndfile.so
module_tmp uuid.so
module_tmp account.so
module_app menu.so
"""
ACCOUNT = "<sip:baresip@127.0.0.1:{port}>;regint=0;answermode={answer}\n"


class Baresip:
    """One baresip process; keys go to its stdin."""

    def __init__(self, folder: Path, source: np.ndarray, dial: str = "", answer: str = "auto") -> None:
        folder.mkdir(exist_ok=True)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        write_wav(folder / "source.wav", source)
        (folder / "accounts").write_text(ACCOUNT.format(port=self.port, answer=answer))
        (folder / "contacts").write_text("")
        (folder / "config").write_text(
            CONFIG.format(port=self.port, source=folder / "source.wav", folder=folder, modules=MODULES)
        )
        command = ["baresip", "-4", "-f", str(folder), "-t", "30"] + (["-e", f"/dial {dial}"] if dial else [])
        self.folder = folder
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log)

    def press(self, keys: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(keys.encode())
        self.process.stdin.flush()

    def text(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def heard(self) -> np.ndarray:
        """What baresip decoded from us."""
        (path,) = self.folder.glob("dump-*-dec.wav")
        return read_wav(path)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.log.close()


@contextlib.contextmanager
def baresip(*arguments, **named) -> Iterator[Baresip]:
    peer = Baresip(*arguments, **named)
    try:
        yield peer
    finally:
        peer.stop()


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * RATE), "<i2")


async def test_speech_crosses_both_ways_and_baresip_hangs_up(tmp_path):
    voice = warble(2.0, 500)
    source = np.concatenate([silence(0.5), voice, silence(20)])  # its player ends the call at the end of the file
    async with tone_agent() as agent:
        with baresip(tmp_path / "b", source, dial=f"sip:100@{agent.address}") as peer:
            await until(lambda: agent.calls and len(agent.calls[0].heard) > 4 * 2 * RATE)
            peer.press("b")
            await until(lambda: agent.calls[0].is_over.is_set())
            await asyncio.sleep(0.3)
            call = agent.calls[0]
            assert call.incoming.did == "100" and call.incoming.ani == "baresip"
            assert similarity(call.heard_samples(), voice) > 0.8, peer.text()[-2000:]
            peer.press("q")
            await until(lambda: peer.process.poll() is not None)
            assert similarity(peer.heard(), agent.voice) > 0.8
            assert (call.ended.cause, call.ended.by) == ("normal", "caller")


async def test_keys_pressed_in_baresip_arrive(tmp_path):
    async with tone_agent() as agent:
        with baresip(tmp_path / "b", silence(25), dial=f"sip:100@{agent.address}") as peer:
            await until(lambda: agent.calls and len(agent.calls[0].heard) > RATE)
            for key in "123#":
                peer.press(key)
                await asyncio.sleep(0.4)
            await until(lambda: len(agent.calls[0].digits) >= 4)
            assert agent.calls[0].digits == "123#", peer.text()[-2000:]
            peer.press("b")
            await until(lambda: agent.calls[0].is_over.is_set())


async def test_hold_and_resume_keep_the_call_and_its_clock(tmp_path):
    voice = warble(20.0, 500)
    async with tone_agent() as agent:
        with baresip(tmp_path / "b", voice, dial=f"sip:100@{agent.address}") as peer:
            await until(lambda: agent.calls and len(agent.calls[0].heard) > RATE)
            call = agent.calls[0]
            peer.press("x")
            await asyncio.sleep(1.5)
            held = call.heard_samples()[-RATE // 2 :]
            assert np.abs(held).max() < 100, "audio during hold"
            peer.press("X")
            await asyncio.sleep(1.0)
            resumed = call.heard_samples()[-RATE // 4 :]
            assert np.abs(resumed).max() > 4000, peer.text()[-2000:]
            peer.press("b")
            await until(lambda: call.is_over.is_set())
            assert call.ended.cause == "normal"


async def test_blind_transfer_is_carried_out_and_its_outcome_reported(tmp_path):
    async with tone_agent() as target:
        async with tone_agent(refer_to=f"sip:200@{target.address}") as agent:
            with baresip(tmp_path / "b", silence(25), dial=f"sip:100@{agent.address}") as peer:
                await until(lambda: agent.calls and agent.calls[0].is_over.is_set())
                result = agent.calls[0].refer_result
                assert result is not None and result.sip_status == 200, peer.text()[-2000:]
                assert agent.calls[0].ended.cause == "transferred"
                await until(lambda: target.calls and len(target.calls[0].heard) > RATE)
                assert target.calls[0].incoming.did == "200"


@pytest.mark.parametrize("kind", ["fake engine", "weights"])
async def test_whole_stack_greets_baresip_and_keeps_a_row_of_the_call(kind, tmp_path):
    async with whole_stack(kind, tmp_path) as stack:
        with baresip(tmp_path / "b", silence(60), dial=f"sip:100@{stack.address}") as peer:
            await until(lambda: any(row["state"] != "closed" for row in stack.call_rows()))
            await asyncio.sleep(4)
            peer.press("b")
            await until(lambda: stack.call_rows()[0]["state"] == "closed")
            peer.press("q")
            await until(lambda: peer.process.poll() is not None)
            assert loud_seconds(peer.heard()) > 1.0, "no greeting"
        (row,) = stack.call_rows()
        assert (row["did"], row["ani"], row["ended_by"]) == ("100", "baresip", "caller")
        assert row["codec"] in ("PCMU/8000", "PCMA/8000")
