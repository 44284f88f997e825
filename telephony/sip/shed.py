"""What stands in front of pjsip and behind it: requests are read strictly, floods are dropped, and calls that cannot be
taken are refused before there is a call.

pjsua2 has no modules, so ours are registered with the C library underneath, by ctypes; the struct is pjsip's own.

- First, above the transport (RFC 3261 §18): a source that floods is not read; what is wrong or ambiguous is answered
  here (`message.py`), because the wheel's asserts would end the worker; addresses that abort pjsip are made unreadable.
- Behind transactions and dialogs, before pjsua: a new INVITE. One that finds the worker full, closing or without an
  agent is refused statelessly (§8.2.7), which takes no call, no socket and no port of pjsua; of the others, `floods.py`
  lets through as many as the wheel's 64 sockets allow.
- Last, what no module took (a REGISTER, an unknown method): 501 (§21.5.2), where pjsip is silent.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pjsua2 as pj

from telephony.sip.floods import Floods
from telephony.sip.message import Fault, Message, fault_of, key_of, read_message, unreadable_addresses
from telephony.sip.packets import (
    UNKNOWN,
    Packet,
    PjStr,
    address_of,
    is_of_a_dialog,
    make_relay,
    make_unreadable,
    packet_of,
    pool_of,
)  # fmt: skip

_FIRST = 12  # priority: after the transport layer (8), before transactions (16) and dialogs (32)
_BEFORE_CALLS = 40  # after dialogs (32), before dialog usages (48) and applications (64)
_LAST = 163  # after every application module (64)
_PASSED_ON, _TAKEN = 0, 1  # what a module's callback returns
_NOT_IMPLEMENTED = 501
_OnMessage = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class _Module(ctypes.Structure):
    """pjsip/sip_module.h: struct pjsip_module."""

    _fields_ = [
        ("prev", ctypes.c_void_p), ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p), ("name_length", ctypes.c_ssize_t),
        ("id", ctypes.c_int), ("priority", ctypes.c_int),
        ("load", ctypes.c_void_p), ("start", ctypes.c_void_p), ("stop", ctypes.c_void_p), ("unload", ctypes.c_void_p),
        ("on_rx_request", _OnMessage), ("on_rx_response", _OnMessage),
        ("on_tx_request", ctypes.c_void_p), ("on_tx_response", ctypes.c_void_p), ("on_tsx_state", ctypes.c_void_p),
    ]  # fmt: skip


class _List(ctypes.Structure):
    """pj/list.h: what every header begins with, and the head of a list of headers."""

    _fields_ = [("prev", ctypes.c_void_p), ("next", ctypes.c_void_p)]


Note = Callable[[str, str, str], None]
"""(kind, source, detail): see wire.SecurityEvent."""

MayEnter = Callable[[Packet, Message], Fault | None]
"""Asked for every new INVITE: None = yes."""

OriginOf = Callable[[Packet, Message], str]
"""The address that called, behind a proxy of ours too."""


@dataclass(frozen=True)
class Door:
    """Who may enter, as the endpoint knows it."""

    may_enter: MayEnter
    origin_of: OriginOf
    note: Note


def _guarded(on_message: Callable[[Shedder, int], int]) -> Callable[[Shedder, int], int]:
    """An exception must not unwind into pjsip's C stack; the message that raised it goes no further."""

    @functools.wraps(on_message)
    def wrapper(self: Shedder, rx_data: int) -> int:
        try:
            return on_message(self, rx_data)
        except Exception:  # noqa: BLE001 - see above
            traceback.print_exc(file=sys.stderr)
            return _TAKEN

    return wrapper


class Shedder:
    """Registered once, for the life of the process; time is what the endpoint last set."""

    def __init__(self, floods: Floods, door: Door) -> None:
        self.floods, self._door = floods, door
        self.now_s = 0.0
        self._library = library = pjsip_library()
        library.pjsip_rx_data_get_info.restype = ctypes.c_char_p
        library.pjsip_rx_data_get_info.argtypes = [ctypes.c_void_p]
        library.pjsua_get_pjsip_endpt.restype = ctypes.c_void_p
        library.pjsip_endpt_register_module.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        library.pjsip_endpt_respond_stateless.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        library.pjsip_generic_string_hdr_create.restype = ctypes.c_void_p
        library.pjsip_generic_string_hdr_create.argtypes = [ctypes.c_void_p] * 3
        self._endpoint = library.pjsua_get_pjsip_endpt()
        self._modules = [
            self._register(b"mod-minmo-reader", _FIRST, self._on_request, self._on_response),
            self._register(b"mod-minmo-door", _BEFORE_CALLS, self._on_new_request),
            self._register(b"mod-minmo-unhandled", _LAST, self._on_unhandled),
        ]

    def _register(
        self, name: bytes, priority: int, on_request: Callable[[int], int],
        on_response: Callable[[int], int] | None = None,
    ) -> _Module:  # fmt: skip
        """What is returned must live as long as the library."""
        module = _Module(name=name, name_length=len(name), id=-1, priority=priority)
        module.on_rx_request = _OnMessage(on_request)
        if on_response is not None:
            module.on_rx_response = _OnMessage(on_response)
        status = self._library.pjsip_endpt_register_module(self._endpoint, ctypes.byref(module))
        if status:
            raise RuntimeError(f"pjsip refused the module {name.decode()}: {status}")
        return module

    # --------------------------------------------------------------- pjsip calls

    @_guarded
    def _on_request(self, rx_data: int) -> int:
        if not self.floods.may_be_read(address_of(rx_data), self.now_s):
            return _TAKEN
        packet = packet_of(rx_data)
        if packet is None:
            return _PASSED_ON
        request = read_message(packet.text)
        fault = fault_of(request)
        if fault is not None:
            self._refuse(rx_data, packet, fault)
            return _TAKEN
        make_unreadable(packet, unreadable_addresses(request))  # of an ACK, which cannot be refused
        if request.method == "BYE":
            self._look_at_bye(packet, request)
        if key := key_of(request):
            make_relay(rx_data, key)
        return _PASSED_ON

    @_guarded
    def _on_response(self, rx_data: int) -> int:
        packet = packet_of(rx_data)
        if packet is not None:
            make_unreadable(packet, unreadable_addresses(read_message(packet.text)))
        return _PASSED_ON

    @_guarded
    def _on_new_request(self, rx_data: int) -> int:
        """Of no transaction and no dialog."""
        packet = packet_of(rx_data)
        if packet is None or not packet.text.upper().startswith("INVITE "):
            return _PASSED_ON
        request = read_message(packet.text)
        fault = self._door.may_enter(packet, request)
        if fault is not None:
            self._respond(rx_data, fault.status, fault.headers)
            return _TAKEN
        return _PASSED_ON if self.floods.may_call(self._door.origin_of(packet, request), self.now_s) else _TAKEN

    @_guarded
    def _on_unhandled(self, rx_data: int) -> int:
        packet = packet_of(rx_data)
        words = (self._library.pjsip_rx_data_get_info(rx_data) or b"").decode("utf-8", "replace")
        if words.startswith("Request msg ACK/"):  # never answered (RFC 3261 §17.1)
            return _PASSED_ON
        self._door.note("not_served", packet.source if packet else UNKNOWN, packet.first_line if packet else words)
        self._respond(rx_data, _NOT_IMPLEMENTED)
        return _TAKEN

    # ------------------------------------------------------------------- private

    def _refuse(self, rx_data: int, packet: Packet, fault: Fault) -> None:
        if not fault.headers:  # an extension that we do not know is no fault of the sender's
            self._door.note("malformed", packet.source, fault.reason)
        if fault.status:
            self._respond(rx_data, fault.status, fault.headers)

    def _look_at_bye(self, packet: Packet, request: Message) -> None:
        """pjsip answers a BYE of no dialog with 481 by itself (§15.1.2); here it is noted. One that is sent again while
        its call ends still finds the dialog."""
        if not is_of_a_dialog(self._library, request.value("call-id"), request.tag("to"), request.tag("from")):
            self._door.note("third_party_bye", packet.source, packet.first_line)

    def _respond(self, rx_data: int, status: int, headers: Iterable[tuple[str, str]] = ()) -> None:
        """Statelessly (RFC 3261 §8.2.7): the same request gets the same answer again."""
        head = _List()
        at = ctypes.addressof(head)
        head.prev = head.next = at
        texts = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers]
        for name, value in texts:
            new = self._library.pjsip_generic_string_hdr_create(
                pool_of(rx_data), ctypes.byref(PjStr.of(name)), ctypes.byref(PjStr.of(value))
            )
            link, last = _List.from_address(new), _List.from_address(head.prev)
            link.prev, link.next = head.prev, at
            last.next = head.prev = new
        self._library.pjsip_endpt_respond_stateless(self._endpoint, rx_data, status, None, at, None)


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
