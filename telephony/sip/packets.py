"""What pjsip keeps of a message that came in, read and corrected with ctypes: its text and where it came from; and
pjsip's own log.

pjsua2 shows neither before there is a call. The layout is pjsip_rx_data's (sip_transport.h) of a 64-bit build with
PJSIP_MAX_PKT_LEN 4000; a build that has another one is noticed (text and source must look like what they are), and
then a message simply has no source and is not looked at. Everything read is the sender's claim.
"""

from __future__ import annotations

import ctypes
import ipaddress
import re
import sys
from collections import deque
from dataclasses import dataclass

_MAX_PACKET = 4000
_REFUSED_PACKET = re.compile(r"Error processing packet from (\S+):(\d+): ([^\r\n]{0,120})")
_MAX_KEPT = 64
_LogFunction = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
UNKNOWN = "unknown"


class _RxData(ctypes.Structure):
    """pjsip/sip_transport.h: struct pjsip_rx_data, up to the parsed message."""

    _fields_ = [
        ("pool", ctypes.c_void_p), ("transport", ctypes.c_void_p), ("tp_data", ctypes.c_void_p),
        ("op_key", ctypes.c_void_p * 34), ("op_key_rdata", ctypes.c_void_p),
        ("received_s", ctypes.c_long), ("received_ms", ctypes.c_long),
        ("packet", ctypes.c_char * _MAX_PACKET), ("zero", ctypes.c_uint32), ("length", ctypes.c_ssize_t),
        ("source", ctypes.c_uint8 * 28), ("source_length", ctypes.c_int),
        ("source_name", ctypes.c_char * 46), ("source_port", ctypes.c_int),
        ("message_at", ctypes.c_void_p), ("message_length", ctypes.c_int), ("message", ctypes.c_void_p),
    ]  # fmt: skip


class PjStr(ctypes.Structure):
    """pj/types.h: pj_str_t. `text` is not ended by a zero."""

    _fields_ = [("text", ctypes.c_void_p), ("length", ctypes.c_ssize_t)]

    @classmethod
    def of(cls, value: bytes) -> PjStr:
        """Valid as long as `value` is."""
        return cls(ctypes.cast(ctypes.c_char_p(value), ctypes.c_void_p), len(value))


class _MessageBody(ctypes.Structure):
    """pjsip/sip_msg.h: struct pjsip_msg_body."""

    _fields_ = [
        ("type", PjStr), ("subtype", PjStr), ("parameters", ctypes.c_void_p * 6),
        ("text", ctypes.c_void_p), ("length", ctypes.c_uint),
    ]  # fmt: skip


_BODY_POINTER_AT = 104  # in struct pjsip_msg, behind its type, its first line and the head of its header list
_RELAYED = {key: f"Signal={key}\r\nDuration=160\r\n".encode() for key in "0123456789*#ABCD"}
_RELAY = b"dtmf-relay"


@dataclass(frozen=True)
class Packet:
    """One message. `text`: each character is one byte; `at`: where it lies in memory, until the callback returns."""

    text: str
    source: str  # "ip:port"
    at: int

    @property
    def first_line(self) -> str:
        return self.text.split("\r\n", 1)[0].encode("latin-1").decode("utf-8", "replace")


def address_of(rx_data: int) -> str:
    """Who sent the message at this address, cheaply."""
    return bytes(_RxData.from_address(rx_data).source_name).decode("ascii", "replace")


def packet_of(rx_data: int) -> Packet | None:
    """The message at this address; None when this build of pjsip keeps it otherwise."""
    raw = _RxData.from_address(rx_data)
    first = rx_data + _RxData.packet.offset
    length = raw.message_length
    if not first <= (raw.message_at or 0) <= first + _MAX_PACKET - length or not 0 < length <= _MAX_PACKET:
        return None
    try:
        address = ipaddress.ip_address(raw.source_name.decode("ascii", "replace"))
    except ValueError:
        return None
    text = ctypes.string_at(raw.message_at, length).decode("latin-1")
    return Packet(text, f"{address}:{raw.source_port}", raw.message_at)


def pool_of(rx_data: int) -> int:
    """pjsip's memory that lives as long as this message."""
    return int(_RxData.from_address(rx_data).pool)


def make_unreadable(packet: Packet, places: list[tuple[int, int]]) -> None:
    """So that pjsip finds no SDP there that it can use, and says so in its own way."""
    for start, end in places:
        ctypes.memset(packet.at + start, ord("X"), end - start)


def make_relay(rx_data: int, key: str) -> None:
    """Turn the body, of `application/dtmf`, into the `application/dtmf-relay` that pjsua understands."""
    body_at = ctypes.c_void_p.from_address(_RxData.from_address(rx_data).message + _BODY_POINTER_AT).value
    body = _MessageBody.from_address(body_at or 0) if body_at else None
    if body is None or not 0 < body.subtype.length < 32 or ctypes.string_at(body.subtype.text, 4).lower() != b"dtmf":
        return  # this build keeps it otherwise
    body.subtype = PjStr.of(_RELAY)
    body.text, body.length = PjStr.of(_RELAYED[key]).text, len(_RELAYED[key])


def is_of_a_dialog(library: ctypes.CDLL, call_id: str, to_tag: str, from_tag: str) -> bool:
    """Does pjsip hold the dialog a request claims to belong to (RFC 3261 §12)?"""
    library.pjsip_ua_find_dialog.restype = ctypes.c_void_p
    library.pjsip_ua_find_dialog.argtypes = [ctypes.POINTER(PjStr)] * 3 + [ctypes.c_int]
    wanted = [value.encode("latin-1") for value in (call_id, to_tag, from_tag)]
    return library.pjsip_ua_find_dialog(*(ctypes.byref(PjStr.of(value)) for value in wanted), 0) is not None


class PjsipLog:
    """pjsip's errors: to stderr in one line each, and what was malformed kept for whoever asks. Called on any of
    pjsip's threads; `malformed` is appended to and taken from at the other end."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.malformed: deque[tuple[str, str]] = deque(maxlen=_MAX_KEPT)  # (source, pjsip's reason)
        self._function = _LogFunction(self._on_line)  # must live as long as the library
        library.pj_log_set_log_func(self._function)

    def _on_line(self, _level: int, text: int, length: int) -> None:
        line = ctypes.string_at(text, length).decode("utf-8", "replace")
        refused = _REFUSED_PACKET.search(line)
        if refused:
            self.malformed.append((f"{refused.group(1)}:{refused.group(2)}", refused.group(3)))
        else:
            print(f"pjsip: {line.strip()}", file=sys.stderr)
