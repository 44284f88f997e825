"""SIPp (apt: sip-tester) calls us: speech to the agent, the agent's speech to SIPp and back, several calls in a row."""

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

from tests.live.sip_agent import similarity, tone_agent, until, warble  # noqa: E402
from tests.live.stack import whole_stack  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.peers("sipp")]

SCENARIO = """<?xml version="1.0" encoding="ISO-8859-1" ?>
<scenario name="caller">
  <send retrans="500"><![CDATA[
    INVITE sip:[service]@[remote_ip]:[remote_port] SIP/2.0
    Via: SIP/2.0/[transport] [local_ip]:[local_port];branch=[branch]
    From: "SIPp" <sip:sipp@[local_ip]:[local_port]>;tag=[call_number]
    To: <sip:[service]@[remote_ip]:[remote_port]>
    Call-ID: [call_id]
    CSeq: 1 INVITE
    Contact: sip:sipp@[local_ip]:[local_port]
    Max-Forwards: 70
    Content-Type: application/sdp
    Content-Length: [len]

    v=0
    o=- 1 1 IN IP[local_ip_type] [local_ip]
    s=-
    c=IN IP[media_ip_type] [media_ip]
    t=0 0
    m=audio [auto_media_port] RTP/AVP 0
    a=rtpmap:0 PCMU/8000
  ]]></send>
  <recv response="100" optional="true"/>
  <recv response="180" optional="true"/>
  <recv response="200" rrs="true"/>
  <send><![CDATA[
    ACK [next_url] SIP/2.0
    Via: SIP/2.0/[transport] [local_ip]:[local_port];branch=[branch]
    From: "SIPp" <sip:sipp@[local_ip]:[local_port]>;tag=[call_number]
    To: <sip:[service]@[remote_ip]:[remote_port]>[peer_tag_param]
    [routes]
    Call-ID: [call_id]
    CSeq: 1 ACK
    Contact: sip:sipp@[local_ip]:[local_port]
    Max-Forwards: 70
    Content-Length: 0
  ]]></send>
  {media}
  <pause milliseconds="{pause_ms}"/>
  <send retrans="500"><![CDATA[
    BYE [next_url] SIP/2.0
    Via: SIP/2.0/[transport] [local_ip]:[local_port];branch=[branch]
    From: "SIPp" <sip:sipp@[local_ip]:[local_port]>;tag=[call_number]
    To: <sip:[service]@[remote_ip]:[remote_port]>[peer_tag_param]
    [routes]
    Call-ID: [call_id]
    CSeq: 2 BYE
    Max-Forwards: 70
    Content-Length: 0
  ]]></send>
  <recv response="200"/>
</scenario>
"""


def mu_law(samples: np.ndarray) -> bytes:
    """G.711 mu-law, from its definition: sign, exponent of the biased magnitude, four bits of mantissa, inverted."""
    magnitude = np.minimum(np.abs(samples.astype(int)), 32635) + 132
    exponent = np.floor(np.log2(magnitude)).astype(int) - 7
    mantissa = (magnitude >> (exponent + 3)) & 0x0F
    return (~((samples < 0) * 0x80 | exponent << 4 | mantissa) & 0xFF).astype(np.uint8).tobytes()


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return min(probe.getsockname()[1] & ~1, 60000)


@contextlib.contextmanager
def sipp(folder: Path, address: str, pause_ms: int, media: str = "", options: tuple[str, ...] = ()) -> Iterator:
    (folder / "scenario.xml").write_text(SCENARIO.format(media=media, pause_ms=pause_ms))
    command = [
        "sipp", address, "-sf", str(folder / "scenario.xml"), "-s", "100", "-i", "127.0.0.1", "-p", str(free_port()),
        "-mp", str(free_port()), "-nostdin", "-timeout", "30", "-trace_err",
        "-error_file", str(folder / "errors"), *options,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def errors_of(folder: Path) -> str:
    path = folder / "errors"
    return path.read_text(errors="replace") if path.exists() else ""


async def test_speech_from_sipp_is_heard_and_its_bye_ends_the_call(tmp_path):
    voice = warble(2.0, 500)
    (tmp_path / "voice.ul").write_bytes(mu_law(voice))
    media = f'<nop><action><exec rtp_stream="{tmp_path}/voice.ul,-1,0,PCMU/8000"/></action></nop>'
    async with tone_agent() as agent:
        with sipp(tmp_path, agent.address, 3500, media, ("-m", "1")) as process:
            await until(lambda: process.poll() is not None)
            assert process.returncode == 0, errors_of(tmp_path)
        call = agent.calls[0]
        await until(lambda: call.is_over.is_set())
        assert similarity(call.heard_samples(), voice) > 0.8
        assert (call.incoming.ani, call.incoming.display_name) == ("sipp", "SIPp")
        assert (call.ended.cause, call.ended.by) == ("normal", "caller")


async def test_what_the_agent_says_reaches_sipp_which_sends_it_back(tmp_path):
    async with tone_agent() as agent:
        with sipp(tmp_path, agent.address, 3500, "", ("-m", "1", "-rtp_echo")) as process:
            await until(lambda: process.poll() is not None)
            assert process.returncode == 0, errors_of(tmp_path)
        call = agent.calls[0]
        await until(lambda: call.is_over.is_set())
        assert similarity(call.heard_samples(), agent.voice) > 0.8


async def test_twelve_calls_three_at_a_time_all_succeed(tmp_path):
    async with tone_agent() as agent:
        with sipp(tmp_path, agent.address, 700, "", ("-m", "12", "-l", "3", "-r", "5")) as process:
            await until(lambda: process.poll() is not None, 25)
            assert process.returncode == 0, errors_of(tmp_path)
        await asyncio.sleep(0.3)
        assert len(agent.calls) == 12 and all(call.is_over.is_set() for call in agent.calls)
        assert {call.ended.cause for call in agent.calls} == {"normal"}


@pytest.mark.parametrize("kind", ["fake engine", "weights"])
async def test_whole_stack_takes_three_calls_of_sipp_and_keeps_their_rows(kind, tmp_path):
    async with whole_stack(kind, tmp_path) as stack:
        with sipp(tmp_path, stack.address, 2500, "", ("-m", "3", "-l", "3", "-r", "2")) as process:
            await until(lambda: process.poll() is not None, 25)
            assert process.returncode == 0, errors_of(tmp_path)
        await until(lambda: [row["state"] for row in stack.call_rows()] == ["closed"] * 3)
        assert {(row["ani"], row["ended_by"]) for row in stack.call_rows()} == {("sipp", "caller")}
