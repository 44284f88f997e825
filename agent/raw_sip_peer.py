"""A SIP peer made of one UDP socket and text: it can send what no well-behaved library would, and sees RTP as it
arrives.

For the media bench and the tests. Blocking; knows no transactions, no retransmission and one call. RFC 3261, RFC 4566.
"""

from __future__ import annotations

import re
import socket
import uuid

SDP = (
    "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=-\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
    "m=audio {port} RTP/AVP {formats}\r\n{attributes}"
)
PCMU = ("0 101", "a=rtpmap:0 PCMU/8000\r\na=rtpmap:101 telephone-event/8000\r\na=fmtp:101 0-15\r\n")
G722_ONLY = ("9", "a=rtpmap:9 G722/8000\r\n")


class RawPeer:
    """Sends requests to `target` ("host:port") and reads whatever comes."""

    def __init__(self, target: str, source: str = "127.0.0.1") -> None:
        host, port = target.split(":")
        self.target = (host, int(port))
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((source, 0))
        self.socket.settimeout(5)
        self.media = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.media.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.tag, self.call_id = uuid.uuid4().hex[:8], uuid.uuid4().hex
        self.request_uri, self.to_uri = f"sip:100@{target}", f"sip:100@{host}"

    def request(self, method: str, cseq: int = 1, to_tag: str = "", body: str = "", headers: str = "") -> None:
        transaction = "INVITE" if method == "CANCEL" else method  # RFC 3261 §9.1: a CANCEL has its INVITE's branch
        self._send(
            f"{method} {self.request_uri} SIP/2.0\r\n"
            f"Via: SIP/2.0/UDP 127.0.0.1:{self.port};branch=z9hG4bK{self.call_id[:10]}{transaction}{cseq};rport\r\n"
            f'Max-Forwards: 70\r\nFrom: "Raw <b>" <sip:raw@127.0.0.1>;tag={self.tag}\r\n'
            f"To: <{self.to_uri}>{';tag=' + to_tag if to_tag else ''}\r\nCall-ID: {self.call_id}\r\n"
            f"CSeq: {cseq} {method}\r\nContact: <sip:raw@127.0.0.1:{self.port}>\r\n{headers}",
            body,
        )

    def invite(self, formats: tuple[str, str] = PCMU, headers: str = "") -> None:
        self.request("INVITE", body=self.sdp(formats), headers=headers)

    def sdp(self, formats: tuple[str, str] = PCMU) -> str:
        return SDP.format(port=self.media.getsockname()[1], formats=formats[0], attributes=formats[1])

    def respond(self, request: str, status: str, body: str = "", headers: str = "") -> None:
        """Answer a request with its own Via, From, To, Call-ID and CSeq."""
        copied = [line for line in request.splitlines() if re.match(r"(Via|From|To|Call-ID|CSeq):", line)]
        copied = [
            f"{line};tag={self.tag}" if line.startswith("To:") and "tag=" not in line else line for line in copied
        ]
        self._send(
            f"SIP/2.0 {status}\r\n"
            + "\r\n".join(copied)
            + f"\r\nContact: <sip:raw@127.0.0.1:{self.port}>\r\n{headers}",
            body,
        )

    def receive(self, start: str) -> str:
        """The next message that starts so; others are passed over."""
        while True:
            message = self.socket.recv(65536).decode(errors="replace")  # RTCP of a neighbour may stray here
            if message.startswith(start):
                return message

    def final(self) -> str:
        """The next final response."""
        while True:
            message = self.receive("SIP/2.0")
            if not message.startswith("SIP/2.0 1"):
                return message

    def close(self) -> None:
        self.socket.close()
        self.media.close()

    def _send(self, head: str, body: str) -> None:
        kind = "Content-Type: application/sdp\r\n" if body.startswith("v=0") else ""
        self.socket.sendto(f"{head}{kind}Content-Length: {len(body)}\r\n\r\n{body}".encode(), self.target)


def header(message: str, name: str) -> str:
    found = re.search(rf"^{name}:\s*(.*)$", message, re.MULTILINE | re.IGNORECASE)
    return found.group(1).strip() if found else ""


def to_tag(message: str) -> str:
    found = re.search(r"^To:.*;tag=([^;\s]+)", message, re.MULTILINE | re.IGNORECASE)
    return found.group(1) if found else ""
