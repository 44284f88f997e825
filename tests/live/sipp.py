"""SIPp (apt: sip-tester) as a caller in the live tests: its scenario, its process, and what it plays."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_CALL = """<?xml version="1.0" encoding="ISO-8859-1" ?>
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
"""
_PAUSE_AND_BYE = """  <pause milliseconds="{pause_ms}"/>
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
SCENARIO = _CALL + _PAUSE_AND_BYE
_ANSWER = """<send><![CDATA[
    SIP/2.0 {status}
    [last_Via:]
    [last_From:]
    [last_To:]
    [last_Call-ID:]
    [last_CSeq:]
    Contact: sip:sipp@[local_ip]:[local_port]
    Content-Length: 0
  ]]></send>
"""
_NOTIFY = """<send retrans="500"><![CDATA[
    NOTIFY [next_url] SIP/2.0
    Via: SIP/2.0/[transport] [local_ip]:[local_port];branch=[branch]
    From: "SIPp" <sip:sipp@[local_ip]:[local_port]>;tag=[call_number]
    To: <sip:[service]@[remote_ip]:[remote_port]>[peer_tag_param]
    [routes]
    Call-ID: [call_id]
    CSeq: {cseq} NOTIFY
    Contact: sip:sipp@[local_ip]:[local_port]
    Max-Forwards: 70
    Event: refer
    Subscription-State: {state}
    Content-Type: message/sipfrag;version=2.0
    Content-Length: [len]

    SIP/2.0 {status}
  ]]></send>
  <recv response="200"/>
"""


def referred_scenario(refer_to: str, answer: str, outcome: str) -> str:
    """The call of SCENARIO, in which a REFER to exactly `refer_to` comes; SIPp fails on any other target.

    `answer`: what the REFER gets. `outcome`: what the NOTIFYs report in the end ("" = none come). The call goes on.
    """
    target = f"^ *<{re.escape(refer_to)}> *$".replace("<", "&lt;").replace(">", "&gt;").replace("\\-", "-")
    steps = f"""  <recv request="REFER"><action>
    <ereg regexp="{target}" search_in="hdr" header="Refer-To:" check_it="true" assign_to="target"/>
  </action></recv>
  <Reference variables="target"/>
  {_ANSWER.format(status=answer)}"""
    if outcome:
        steps += _NOTIFY.format(cseq=2, state="active;expires=60", status="100 Trying")
        steps += _NOTIFY.format(cseq=3, state="terminated;reason=noresource", status=outcome)
    return _CALL + steps + _PAUSE_AND_BYE.replace("CSeq: 2 BYE", "CSeq: 4 BYE")


def mu_law(samples: np.ndarray) -> bytes:
    """G.711 mu-law, from its definition: sign, exponent of the biased magnitude, four bits of mantissa, inverted."""
    magnitude = np.minimum(np.abs(samples.astype(int)), 32635) + 132
    exponent = np.floor(np.log2(magnitude)).astype(int) - 7
    mantissa = (magnitude >> (exponent + 3)) & 0x0F
    return (~((samples < 0) * 0x80 | exponent << 4 | mantissa) & 0xFF).astype(np.uint8).tobytes()


def play(folder: Path, samples: np.ndarray, after_ms: int = 0) -> str:
    """The scenario's step that plays these samples once."""
    path = folder / "play.ul"
    path.write_bytes(mu_law(samples))
    step = f'<nop><action><exec rtp_stream="{path},1,0,PCMU/8000"/></action></nop>'
    return f'<pause milliseconds="{after_ms}"/>{step}' if after_ms else step


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return min(probe.getsockname()[1] & ~1, 60000)


@contextlib.contextmanager
def sipp(
    folder: Path, address: str, pause_ms: int, media: str = "", options: tuple[str, ...] = (), user: str = "sipp",
    scenario: str = SCENARIO, timeout_s: int = 30,
) -> Iterator[subprocess.Popen[bytes]]:  # fmt: skip
    text = scenario.replace("sip:sipp@", f"sip:{user}@").replace("{media}", media)
    (folder / "scenario.xml").write_text(text.replace("{pause_ms}", str(pause_ms)))
    command = [
        "sipp", address, "-sf", str(folder / "scenario.xml"), "-s", "100", "-i", "127.0.0.1", "-p", str(free_port()),
        "-mp", str(free_port()), "-nostdin", "-timeout", str(timeout_s), "-trace_err",
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
