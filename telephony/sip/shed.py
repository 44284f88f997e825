"""What pjsua2 leaves to its user at both ends of pjsip's stack: floods, and requests that nobody handles.

More INVITEs than a worker can look at are dropped before pjsip makes calls of them; their transactions try again.

Found with a flood: every INVITE, also one that is refused, takes two RTP sockets until half a second after its end, and
the wheel's pjlib holds 64 sockets and aborts at the 65th: live calls would die of a burst of calls that are refused
anyway. So a module of ours (above the transport of RFC 3261 §18, below the transactions of §17) lets `invites_per_s`
through and swallows the rest unanswered: UDP sends an INVITE again after 0.5 s, 1 s, 2 s (§17.1.1.2).

At the other end stand methods that no module took (a REGISTER, an unknown one): 501 (§21.5.2), where pjsip is silent.
pjsua2 has no modules, so ours are registered with the C library underneath, by ctypes; the struct is pjsip's own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pjsua2 as pj

from telephony.sip.packets import UNKNOWN, is_of_a_dialog, packet_of

_FIRST = 12  # priority: after the transport layer (8), before transactions (16) and dialogs (32)
_LAST = 163  # after every application module (64)
_NOT_IMPLEMENTED = 501
_BURST = 8
_OnMessage = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class _Module(ctypes.Structure):
    """pjsip/sip_module.h: struct pjsip_module."""

    _fields_ = [
        ("prev", ctypes.c_void_p), ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p), ("name_length", ctypes.c_ssize_t),
        ("id", ctypes.c_int), ("priority", ctypes.c_int),
        ("load", ctypes.c_void_p), ("start", ctypes.c_void_p), ("stop", ctypes.c_void_p), ("unload", ctypes.c_void_p),
        ("on_rx_request", _OnMessage), ("on_rx_response", ctypes.c_void_p),
        ("on_tx_request", ctypes.c_void_p), ("on_tx_response", ctypes.c_void_p), ("on_tsx_state", ctypes.c_void_p),
    ]  # fmt: skip


class TokenBucket:
    """So many at once, so many a second; time is an argument."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s, self._burst = per_s, burst
        self._tokens, self._at_s = float(burst), 0.0

    def take(self, now_s: float) -> bool:
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._tokens < 1 - 1e-9:
            return False
        self._tokens -= 1
        return True


Note = Callable[[str, str, str], None]
"""(kind, source, detail): see wire.SecurityEvent."""


class Shedder:
    """Registered once, for the life of the process. `num_shed` grows; time is what the endpoint last set. `note` is
    told of what has no place here."""

    def __init__(self, invites_per_s: int, note: Note) -> None:
        self._note = note
        self._bucket = TokenBucket(invites_per_s, min(_BURST, invites_per_s))
        self.now_s = 0.0
        self.num_shed = 0
        self._library = library = pjsip_library()
        library.pjsip_rx_data_get_info.restype = ctypes.c_char_p
        library.pjsip_rx_data_get_info.argtypes = [ctypes.c_void_p]
        library.pjsua_get_pjsip_endpt.restype = ctypes.c_void_p
        library.pjsip_endpt_register_module.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        library.pjsip_endpt_respond_stateless.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        self._endpoint = library.pjsua_get_pjsip_endpt()
        self._modules = [
            self._register(b"mod-minmo-shed", _FIRST, self._on_request),
            self._register(b"mod-minmo-unhandled", _LAST, self._on_unhandled),
        ]

    def _register(self, name: bytes, priority: int, on_request: Callable[[int], int]) -> _Module:
        """What is returned must live as long as the library."""
        callback = _OnMessage(on_request)
        module = _Module(name=name, name_length=len(name), id=-1, priority=priority, on_rx_request=callback)
        status = self._library.pjsip_endpt_register_module(self._endpoint, ctypes.byref(module))
        if status:
            raise RuntimeError(f"pjsip refused the module {name.decode()}: {status}")
        return module

    def _method_of(self, rx_data: int) -> bytes:
        """From pjsip's own words for a message, "Request msg INVITE/cseq=1 (…)"."""
        words = (self._library.pjsip_rx_data_get_info(rx_data) or b"").split(b"/", 1)[0].split()
        return words[-1] if words else b""

    def _on_request(self, rx_data: int) -> int:
        """1 = swallowed."""
        method = self._method_of(rx_data)
        if method == b"BYE":
            self._look_at_bye(rx_data)
        if method != b"INVITE" or self._bucket.take(self.now_s):
            return 0
        self.num_shed += 1
        return 1

    def _look_at_bye(self, rx_data: int) -> None:
        """pjsip answers a BYE of no dialog with 481 by itself (§15.1.2); here it is noted. One that is sent again while
        its call ends still finds the dialog."""
        packet = packet_of(rx_data, b"BYE")
        if packet is not None and not is_of_a_dialog(self._library, packet):
            self._note("third_party_bye", packet.source, packet.first_line)

    def _on_unhandled(self, rx_data: int) -> int:
        method = self._method_of(rx_data)
        if method == b"ACK":  # never answered (RFC 3261 §17.1)
            return 0
        packet = packet_of(rx_data, method)
        self._note("not_served", packet.source if packet else UNKNOWN, packet.first_line if packet else method.decode())
        self._library.pjsip_endpt_respond_stateless(self._endpoint, rx_data, _NOT_IMPLEMENTED, None, None, None)
        return 1


def pjsip_library() -> ctypes.CDLL:
    """The C library inside pjsua2's Python module (loaded already: this is a second handle on it)."""
    file = _library_file()
    return ctypes.CDLL(str(file) if file else None)


def openssl_version() -> str:
    """Of the OpenSSL that pjsip was linked with, in its own words ("1.0.2k-fips"); "" when there is none."""
    library = pjsip_library()
    for name in ("OpenSSL_version", "SSLeay_version"):  # the second: before 1.1.0
        if hasattr(library, name):
            function = getattr(library, name)
            function.restype = ctypes.c_char_p
            words = (function(0) or b"").decode().split()
            return words[1] if len(words) > 1 else ""
    return ""


def _library_file() -> Path | None:
    """In a package of its own (the wheel) or beside pjsua2.py (pjproject's own build)."""
    return next(iter(sorted(Path(pj.__file__).parent.glob("_pjsua2*.so"))), None)
