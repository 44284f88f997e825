"""pjsip asks us for the addresses of host names (`sip/names.py`) instead of waiting for getaddrinfo on the SIP thread.

pjsip takes a resolver of ours (pjsip_ext_resolver, sip_resolve.h), pjsua2 does not show it: registered by ctypes. For
each destination it asks once; we put the address in place of the name and let pjsip's own resolver go on, which knows
transports and default ports (RFC 3263 §4). Request-URI, To and the name that a TLS certificate must bear stay as they
are. Of a name with several addresses the first of the transport's IP version is used.
"""

from __future__ import annotations

import ctypes
import ipaddress
import sys
import time
import traceback
from collections.abc import Callable

from telephony.sip.names import Addresses, Names

_ERESOLVE = 70018  # pj/errno.h: pjsip makes 502 of it
_MAX_NAME_BYTES = 255
_Resolve = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 5)
_Callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _PjStr(ctypes.Structure):
    """pj/types.h: pj_str_t, not ended by a zero."""

    _fields_ = [("text", ctypes.c_void_p), ("length", ctypes.c_ssize_t)]


class _Target(ctypes.Structure):
    """pjsip/sip_types.h: struct pjsip_host_info."""

    _fields_ = [("flag", ctypes.c_uint), ("type", ctypes.c_int), ("host", _PjStr), ("port", ctypes.c_int)]


class _ExternalResolver(ctypes.Structure):
    _fields_ = [("resolve", _Resolve)]


class PjsipNames:
    """Registered once, for the life of the process."""

    def __init__(self, library: ctypes.CDLL, names: Names, ip_version: int) -> None:
        self._names, self._ip_version, self._library = names, ip_version, library
        library.pjsua_get_pjsip_endpt.restype = ctypes.c_void_p
        library.pjsip_endpt_set_ext_resolver.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        library.pjsip_endpt_resolve.argtypes = [ctypes.c_void_p] * 5
        library.pjsip_endpt_resolve.restype = None
        self._endpoint = library.pjsua_get_pjsip_endpt()
        self._own = _ExternalResolver(_Resolve(self._on_resolve))
        self._set(True)

    def _set(self, is_ours: bool) -> None:
        self._library.pjsip_endpt_set_ext_resolver(self._endpoint, ctypes.byref(self._own) if is_ours else None)

    def _on_resolve(self, _resolver: int, pool: int, target: int, token: int, callback: int) -> None:
        wanted = _Target.from_address(target)
        flag, kind, port = wanted.flag, wanted.type, wanted.port  # `target` is pjsip's, and gone when a thread answers
        raw = ctypes.string_at(wanted.host.text, min(wanted.host.length, _MAX_NAME_BYTES))
        name = raw.decode("ascii", "replace").strip("[]")

        def go_on(addresses: Addresses) -> None:
            self._go_on(pool, (flag, kind, port), addresses, token, callback)

        self._safely(lambda: self._names.ask(name, go_on, time.monotonic()))

    def _go_on(self, pool: int, wanted: tuple[int, int, int], addresses: Addresses, token: int, callback: int) -> None:
        fitting = [it for it in addresses if ipaddress.ip_address(it).version == self._ip_version]
        if not fitting:
            _Callback(callback)(_ERESOLVE, token, None)
            return
        flag, kind, port = wanted
        text = fitting[0].encode()
        target = _Target(flag, kind, _PjStr(ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p), len(text)), port)
        self._set(False)  # an address: pjsip's own resolver answers at once
        try:
            self._library.pjsip_endpt_resolve(self._endpoint, pool, ctypes.byref(target), token, callback)
        finally:
            self._set(True)

    def _safely(self, work: Callable[[], None]) -> None:
        """Nothing may unwind into pjsip's C stack."""
        try:
            work()
        except Exception:  # noqa: BLE001 - see above
            traceback.print_exc(file=sys.stderr)
