"""A SIP message read strictly, and what is wrong with it: looked at before pjsip acts on it (see shed.py).

The pjsua2 wheel is built with asserts, so what pjsip did not expect of a peer ends the worker and all of its calls.
What can be read in two ways is therefore not read at all: 400 (RFC 3261 §21.4.1). Pure text; every character is one
byte of the packet (latin-1), so offsets into a message are offsets into memory.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from functools import cached_property

SUPPORTED = frozenset({"100rel", "timer", "replaces", "norefersub"})
"""Option tags that pjsip knows (RFC 3261 §19.2)."""

_SHORT = {
    "c": "content-type", "f": "from", "i": "call-id", "l": "content-length", "m": "contact", "t": "to", "v": "via",
}  # RFC 3261 §7.3.3  # fmt: skip
_SINGLE = ("call-id", "content-length", "content-type", "cseq", "from", "max-forwards", "to")
_NEWLINE = r"(?>\r\n|\r|\n)"  # all three end a line for pjsip
_END_OF_HEAD = re.compile(_NEWLINE + _NEWLINE)
_FOLD = re.compile(_NEWLINE + r"[ \t]+")  # RFC 3261 §7.3.1
_CSEQ = re.compile(r"(\d{1,10})[ \t]+(\S+)")
_RACK = re.compile(r"\d{1,10}[ \t]+\d{1,10}[ \t]+INVITE", re.IGNORECASE)  # RFC 3262 §7.2
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_TAG = re.compile(r";\s*tag\s*=\s*([^;\s]+)", re.IGNORECASE)
_MADDR = re.compile(r";\s*maddr\s*=", re.IGNORECASE)
_CONNECTION = re.compile(r"(?:^|(?<=[\r\n]))[ \t]*c[ \t]*=([^\r\n]*)", re.IGNORECASE)  # RFC 4566 §5.7
_RTCP = re.compile(r"(?:^|(?<=[\r\n]))[ \t]*a[ \t]*=([ \t]*rtcp[ \t]*:[^\r\n]*)", re.IGNORECASE)  # RFC 3605
_ADDRESS = re.compile(r"IN IP([46]) ([0-9A-Fa-f.:]+)")
_PORT = re.compile(r"rtcp:[0-9]{1,5}(?: (.*))?")
_KEY = re.compile(r"\s*([0-9*#A-Da-d])\s*|\s*Signal\s*=\s*([0-9*#A-Da-d])\s*(?:Duration\s*=\s*\d+\s*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Message:
    """`headers` in their order, names long and in lower case."""

    first_line: str
    headers: tuple[tuple[str, str], ...]
    body: str
    body_at: int
    is_whole: bool = True

    @cached_property
    def method(self) -> str:
        """Of a request; pjsip takes "invite" for INVITE."""
        return self.first_line.split(" ", 1)[0].upper()

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    def value(self, name: str) -> str:
        return next(iter(self.values(name)), "")

    def tag(self, name: str) -> str:
        """Of From or To (RFC 3261 §19.3); a quoted name or an address in brackets may hold anything."""
        value = _QUOTED.sub("", self.value(name))
        found = _TAG.search(value.rpartition(">")[2])
        return found.group(1) if found else ""


@dataclass(frozen=True)
class Fault:
    """How a request is refused; status 0 = not at all, it is dropped."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...] = ()


def read_message(text: str) -> Message:
    end = _END_OF_HEAD.search(text)
    head, body_at = (text[: end.start()], end.end()) if end else (text, len(text))
    first_line, *lines = re.split(_NEWLINE, _FOLD.sub(" ", head))
    headers = []
    for line in lines:
        name, _, value = line.partition(":")
        name = name.strip().lower()
        headers.append((_SHORT.get(name, name), value.strip()))
    return Message(first_line, tuple(headers), text[body_at:], body_at, end is not None)


def fault_of(request: Message) -> Fault | None:
    """Why this request goes no further; None = it does. An ACK is never answered (RFC 3261 §17.1)."""
    fault = _ambiguity(request) or _unsupported(request)
    if request.method == "ACK":
        return Fault(0, fault.reason) if fault else None
    if fault is None and _bad_connections(request):
        return Fault(400, "an address in SDP that is not of the type it says")
    return fault


def _ambiguity(request: Message) -> Fault | None:
    if any(_MADDR.search(value) for value in request.values("via")[:1]):
        return Fault(0, "maddr in Via: the answer would go to somebody else")  # RFC 3261 §18.2.2, for multicast
    if not request.is_whole:
        return Fault(400, "no end of the headers")  # longer than what pjsip reads of a datagram
    if any("\0" in text for pair in request.headers for text in pair):
        return Fault(400, "a zero byte in a header")
    for name in _SINGLE:
        if len(request.values(name)) > 1:
            return Fault(400, f"more than one {name}")  # RFC 4475 §3.3.8, §3.3.9
    cseq = _CSEQ.fullmatch(request.value("cseq"))
    if cseq is None or int(cseq.group(1)) >= 2**31:
        return Fault(400, "CSeq")  # RFC 3261 §8.1.1.5
    if cseq.group(2).upper() != request.method:
        return Fault(400, "CSeq names another method")  # the same; pjsip's transactions go by CSeq, its calls do not
    if request.method == "ACK" and not request.tag("to"):
        return Fault(400, "ACK without a To tag")  # RFC 3261 §17.1.1.3: the To of an answer, ours all have one
    if request.method == "PRACK" and [bool(_RACK.fullmatch(rack)) for rack in request.values("rack")] != [True]:
        return Fault(400, "RAck")  # pjsip says 200 to a PRACK that says nothing
    length = request.value("content-length")
    if length and not (length.isdigit() and int(length[:6]) <= len(request.body)):
        return Fault(400, "Content-Length")  # RFC 3261 §18.3
    return None


def _unsupported(request: Message) -> Fault | None:
    """RFC 3261 §8.2.2.3; CANCEL and ACK must not be refused for it."""
    if request.method in ("ACK", "CANCEL"):
        return None
    wanted = [tag.strip() for value in request.values("require") for tag in value.split(",")]
    unknown = [tag for tag in wanted if tag and tag.lower() not in SUPPORTED]
    return Fault(420, "unknown extension", (("Unsupported", ", ".join(unknown)[:200]),)) if unknown else None


def unreadable_addresses(message: Message) -> list[tuple[int, int]]:
    """Where (start, end, in the message) its SDP names an address that is not a literal of the type it says. pjsip
    aborts at `IN IP4 ::1`, and would look a name up, with all calls waiting."""
    places = [line.span(1) for line in (*_bad_connections(message), *_bad_rtcp(message))]
    return [(message.body_at + start, message.body_at + end) for start, end in places]


def _bad_connections(message: Message) -> list[re.Match[str]]:
    return [line for line in _CONNECTION.finditer(message.body) if not _is_address(line.group(1))]


def _bad_rtcp(message: Message) -> list[re.Match[str]]:
    """Without its address the attribute says no more than a default does, so nobody is refused for it."""
    found = [(line, _PORT.fullmatch(line.group(1))) for line in _RTCP.finditer(message.body)]
    return [line for line, port in found if port is None or not (port.group(1) is None or _is_address(port.group(1)))]


def _is_address(words: str) -> bool:
    found = _ADDRESS.fullmatch(words)
    try:
        return found is not None and ipaddress.ip_address(found.group(2)).version == int(found.group(1))
    except ValueError:
        return False


def key_of(request: Message) -> str:
    """The key in an INFO of `application/dtmf`: it is the whole body, or written as in `dtmf-relay`; "" = none."""
    if (
        request.method != "INFO"
        or request.value("content-type").partition(";")[0].strip().lower() != "application/dtmf"
    ):
        return ""
    found = _KEY.fullmatch(request.body)
    return (found.group(1) or found.group(2)).upper() if found else ""
