"""What real peers sent (tests/fixtures/captures/), read and made ready to be sent again from a socket of ours.

Names are ORIGIN-VERSION-WHAT.sip, .sdp or .pcap. Only what must differ is rewritten: addresses and ports, the Via's
branch, Call-ID, and the tags of a dialog that is ours now. RTP is in pcap files (raw IPv4, so that Wireshark opens
them); its bytes are never changed.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "fixtures" / "captures"
_PCAP = struct.Struct("<IHHiIII")
_PCAP_MAGIC, _RAW_IPV4 = 0xA1B2C3D4, 228  # LINKTYPE_IPV4 of tcpdump.org/linktypes
_RECORD = struct.Struct("<IIII")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_UDP = struct.Struct("!HHHH")
_UDP_PROTOCOL = 17


def named(origin: str, what: str) -> Path:
    """The newest capture of this peer."""
    found = sorted(FOLDER.glob(f"{origin}-[0-9]*-{what}"))
    assert found, f"no capture {origin}-*-{what}"
    return found[-1]


def message(origin: str, what: str) -> str:
    return named(origin, f"{what}.sip").read_bytes().decode()


# ------------------------------------------------------------------------- SIP


@dataclass(frozen=True)
class Ours:
    """Whose place a replayed message takes: our sockets, and the worker it goes to."""

    port: int
    media_port: int
    worker: str  # host:port
    call_id: str
    branch: str


def as_ours(text: str, ours: Ours, to_tag: str = "") -> str:
    """A captured request from our socket to the worker; `to_tag`: of the dialog it is sent in."""
    head, _, body = text.partition("\r\n\r\n")
    lines = head.split("\r\n")
    lines[0] = re.sub(r"127\.0\.0\.1(:\d+)?", ours.worker, lines[0], count=1)
    lines = [_line(line, ours, to_tag) for line in lines]
    first_via = next(at for at, line in enumerate(lines) if re.match(r"(Via|v):", line, re.IGNORECASE))
    lines[first_via] = re.sub(r"(SIP/2\.0/\w+ )[^;]+", rf"\g<1>127.0.0.1:{ours.port}", lines[first_via], count=1)
    lines[first_via] = re.sub(r"branch=[^;,\s]+", f"branch=z9hG4bK{ours.branch}", lines[first_via], count=1)
    body = with_media_port(body, ours.media_port)
    lines = [re.sub(r"^(Content-Length:\s*)\d+", rf"\g<1>{len(body.encode())}", line) for line in lines]
    return "\r\n".join(lines) + "\r\n\r\n" + body


def _line(line: str, ours: Ours, to_tag: str) -> str:
    name = line.partition(":")[0].lower()
    if name in ("contact", "m", "record-route"):
        return re.sub(r"127\.0\.0\.1(:\d+)?", f"127.0.0.1:{ours.port}", line, count=1)
    if name in ("call-id", "i"):
        return f"{line.partition(':')[0]}: {ours.call_id}"
    if name in ("to", "t") and to_tag:
        return re.sub(r";tag=[^;\s]+", "", line) + f";tag={to_tag}"
    return line


def with_media_port(sdp: str, port: int) -> str:
    sdp = re.sub(r"^c=IN IP[46] \S+", "c=IN IP4 127.0.0.1", sdp, flags=re.MULTILINE)
    sdp = re.sub(r"^m=audio \d+", f"m=audio {port}", sdp, count=1, flags=re.MULTILINE)
    return re.sub(r"^a=rtcp:\d+", f"a=rtcp:{port + 1}", sdp, flags=re.MULTILINE)


def direction(sdp: str) -> str:
    found = re.findall(r"^a=(sendrecv|sendonly|recvonly|inactive)", sdp, re.MULTILINE)
    return str(found[-1]) if found else "sendrecv"


def ack_of(invite: str, ours: Ours, to_tag: str) -> str:
    """RFC 3261 §13.2.2.4, for an INVITE that was sent as ours."""
    copied = [line for line in invite.split("\r\n") if re.match(r"(From|f|Call-ID|i):", line, re.IGNORECASE)]
    (to,) = re.findall(r"^((?:To|t):[^\r\n]*)", invite, re.MULTILINE | re.IGNORECASE)
    (cseq,) = re.findall(r"^CSeq:\s*(\d+)", invite, re.MULTILINE | re.IGNORECASE)
    lines = [
        f"ACK sip:100@{ours.worker} SIP/2.0", f"Via: SIP/2.0/UDP 127.0.0.1:{ours.port};branch=z9hG4bKack{ours.branch}",
        "Max-Forwards: 70", *copied, re.sub(r";tag=[^;\s]+", "", to) + f";tag={to_tag}", f"CSeq: {cseq} ACK",
        "Content-Length: 0",
    ]  # fmt: skip
    return "\r\n".join(lines) + "\r\n\r\n"


def headers(text: str, *names: str) -> list[str]:
    """Values of a header under any of its names, in order."""
    found = re.findall(rf"^(?:{'|'.join(names)}):\s*(.*?)\r?$", text.partition("\r\n\r\n")[0], re.M | re.I)
    return [str(value) for value in found]


def payload_types(sdp: str) -> dict[str, int]:
    """Of the audio line: "PCMU/8000" -> 0, static numbers (RFC 3551) included, in the offer's order."""
    (numbers,) = re.findall(r"^m=audio \d+ [\w/]+ ([\d ]+)", sdp, re.MULTILINE)
    static = {"0": "PCMU/8000", "8": "PCMA/8000", "9": "G722/8000"}
    names = static | dict(re.findall(r"a=rtpmap:(\d+) ([\w.-]+/\d+)", sdp))
    return {names[number]: int(number) for number in numbers.split() if number in names}


# ------------------------------------------------------------------------ pcap


@dataclass(frozen=True)
class Datagram:
    """One UDP packet on loopback as it came."""

    at_s: float
    source_port: int
    target_port: int
    payload: bytes


def write_pcap(path: Path, datagrams: list[Datagram]) -> None:
    parts = [_PCAP.pack(_PCAP_MAGIC, 2, 4, 0, 0, 65535, _RAW_IPV4)]
    loopback = bytes([127, 0, 0, 1])
    for one in datagrams:
        size = _IPV4.size + _UDP.size + len(one.payload)
        ip = _IPV4.pack(0x45, 0, size, 0, 0, 64, _UDP_PROTOCOL, 0, loopback, loopback)
        udp = _UDP.pack(one.source_port, one.target_port, _UDP.size + len(one.payload), 0)
        micro_s = round(one.at_s * 1e6)
        parts += [_RECORD.pack(micro_s // 1_000_000, micro_s % 1_000_000, size, size), ip, udp, one.payload]
    path.write_bytes(b"".join(parts))


def read_pcap(path: Path) -> list[Datagram]:
    content = path.read_bytes()
    magic, *_, link_type = _PCAP.unpack_from(content)
    assert (magic, link_type) == (_PCAP_MAGIC, _RAW_IPV4), path
    at, datagrams = _PCAP.size, []
    while at < len(content):
        seconds, micro_s, size, _ = _RECORD.unpack_from(content, at)
        packet = content[at + _RECORD.size : at + _RECORD.size + size]
        source_port, target_port, _, _ = _UDP.unpack_from(packet, _IPV4.size)
        payload = packet[_IPV4.size + _UDP.size :]
        datagrams.append(Datagram(seconds + micro_s / 1e6, source_port, target_port, payload))
        at += _RECORD.size + size
    return datagrams
