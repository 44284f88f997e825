"""What pjsip keeps of a message that came in, read with ctypes: its text and where it came from; and pjsip's own log.

pjsua2 shows neither before there is a call. The layout is pjsip_rx_data's (sip_transport.h) of a 64-bit build with
PJSIP_MAX_PKT_LEN 4000; a build that has another one is noticed (text and source must look like what they are), and
then a message simply has no source. Everything read is the sender's claim.
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
    """pjsip/sip_transport.h: struct pjsip_rx_data, up to the sender's port."""

    _fields_ = [
        ("pool", ctypes.c_void_p), ("transport", ctypes.c_void_p), ("tp_data", ctypes.c_void_p),
        ("op_key", ctypes.c_void_p * 34), ("op_key_rdata", ctypes.c_void_p),
        ("received_s", ctypes.c_long), ("received_ms", ctypes.c_long),
        ("packet", ctypes.c_char * _MAX_PACKET), ("zero", ctypes.c_uint32), ("length", ctypes.c_ssize_t),
        ("source", ctypes.c_uint8 * 28), ("source_length", ctypes.c_int),
        ("source_name", ctypes.c_char * 46), ("source_port", ctypes.c_int),
    ]  # fmt: skip


class _PjStr(ctypes.Structure):
    _fields_ = [("text", ctypes.c_char_p), ("length", ctypes.c_ssize_t)]


@dataclass(frozen=True)
class Packet:
    text: str
    source: str  # "ip:port"

    @property
    def first_line(self) -> str:
        return self.text.split("\r\n", 1)[0]


def packet_of(rx_data: int, method: bytes) -> Packet | None:
    """What the message at this address says; None when this build of pjsip keeps it otherwise. `method`: as pjsip
    reads it."""
    raw = _RxData.from_address(rx_data)
    head = ctypes.string_at(ctypes.addressof(raw) + _RxData.packet.offset, _MAX_PACKET)
    if not head.startswith(method) or not 0 < raw.length <= _MAX_PACKET:
        return None
    try:
        address = ipaddress.ip_address(raw.source_name.decode("ascii", "replace"))
    except ValueError:
        return None
    return Packet(head[: raw.length].decode("utf-8", "replace"), f"{address}:{raw.source_port}")


def is_of_a_dialog(library: ctypes.CDLL, packet: Packet) -> bool:
    """Does pjsip hold the dialog this request claims to belong to (RFC 3261 §12)?"""
    library.pjsip_ua_find_dialog.restype = ctypes.c_void_p
    library.pjsip_ua_find_dialog.argtypes = [ctypes.POINTER(_PjStr)] * 3 + [ctypes.c_int]
    call_id = _header(packet.text, "Call-ID|i")
    tags = [_tag(_header(packet.text, name)) for name in ("To|t", "From|f")]
    wanted = [value.encode() for value in (call_id, *tags)]
    texts = [_PjStr(value, len(value)) for value in wanted]
    return library.pjsip_ua_find_dialog(*(ctypes.byref(text) for text in texts), 0) is not None


def _header(text: str, names: str) -> str:
    found = re.search(rf"^(?:{names})\s*:[ \t]*(.*?)\s*$", text, re.MULTILINE | re.IGNORECASE)
    return found.group(1) if found else ""


def _tag(value: str) -> str:
    found = re.search(r";\s*tag\s*=\s*([^;\s]+)", value, re.IGNORECASE)
    return found.group(1) if found else ""


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
