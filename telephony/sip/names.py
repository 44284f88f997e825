"""Host names and their addresses: asked for by threads, read by the SIP thread, which never waits for a DNS server.

Every configured name has a thread that asks again and again, so that a dead name delays no other; the last good answer
is kept when a server fails. A name that only a peer told us (a Contact) is asked for once, when pjsip wants to send
there. A and AAAA records, as the system resolves them; SRV and NAPTR (RFC 3263 §4.1, §4.2) are not asked for.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

Addresses = tuple[str, ...]
Lookup = Callable[[str], Addresses]
"""The addresses of a name, best first; OSError or ValueError when there are none."""

_RETRY_S = 5.0  # after no answer, while there has not been one
_MAX_STRAYS = 64  # names told by peers: kept, and asked for, at once


def look_up(name: str) -> Addresses:
    """By the system's resolver: /etc/hosts, DNS, whatever it is made of."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    return tuple(dict.fromkeys(str(item[4][0]).partition("%")[0] for item in found))


def split_host(entry: str) -> tuple[str, int]:
    """(name or address, port) of `host`, `host:port` or `[v6]:port`; port 0 when it names none."""
    if entry.startswith("["):
        name, _, rest = entry[1:].partition("]")
        return name, int(rest[1:] or 0)
    name, _, port = entry.partition(":")
    return name.lower(), int(port or 0)


def literal_of(entry: str) -> Addresses:
    """The address that this entry is itself, () when it is a name."""
    name = split_host(entry)[0]
    try:
        return (str(ipaddress.ip_address(name)),)
    except ValueError:
        return ()


@dataclass
class _Stray:
    """A name that only a peer told us."""

    addresses: Addresses | None = None  # None = asked for
    until_s: float = 0.0
    waiting: list[Callable[[Addresses], None]] = field(default_factory=list)


class Names:
    """Everything but the threads' own loop is called on the SIP thread."""

    def __init__(self, hosts: Iterable[str], refresh_s: float, lookup: Lookup = look_up) -> None:
        self._names = sorted({split_host(host)[0] for host in hosts if not literal_of(host)})
        self._refresh_s, self._lookup = refresh_s, lookup
        self._known: dict[str, Addresses] = {}
        self._strays: dict[str, _Stray] = {}
        self._refused: list[Callable[[Addresses], None]] = []
        self._answers: SimpleQueue[tuple[str, Addresses]] = SimpleQueue()
        self._is_over = threading.Event()

    def start(self, wait_s: float) -> None:
        """Ask for all; wait so long for the first answers, good or bad."""
        for name in self._names:
            threading.Thread(target=self._keep, args=(name,), name=f"dns {name}", daemon=True).start()
        missing, until_s = set(self._names), time.monotonic() + wait_s
        while missing and (left_s := until_s - time.monotonic()) > 0:
            try:
                name, addresses = self._answers.get(timeout=left_s)
            except Empty:
                return
            missing.discard(name)
            self._take(name, addresses)

    def stop(self) -> None:
        self._is_over.set()

    def addresses_of(self, host: str) -> Addresses:
        """Of `host` or `host:port` that is configured: the last good answer."""
        return literal_of(host) or self._known.get(split_host(host)[0], ())

    def ask(self, name: str, answer: Callable[[Addresses], None], now_s: float) -> None:
        """`answer` is called at once when there are addresses, else from `poll`, with () when there are none: who asks
        (pjsua2's makeCall) does not expect to fail before it has returned."""
        name = name.lower()
        if known := self.addresses_of(f"[{name}]" if ":" in name else name):
            answer(known)
        elif name in self._names:
            self._refused.append(answer)  # its own thread goes on asking
        else:
            self._ask_stray(name, answer, now_s)

    def _ask_stray(self, name: str, answer: Callable[[Addresses], None], now_s: float) -> None:
        stray = self._strays.get(name)
        if stray is not None and stray.addresses is not None and now_s < stray.until_s:
            if stray.addresses:
                answer(stray.addresses)
            else:
                self._refused.append(answer)
            return
        if stray is None or stray.addresses is not None:
            self._forget(now_s)
            if len(self._strays) >= _MAX_STRAYS:
                self._refused.append(answer)
                return
            stray = self._strays[name] = _Stray(until_s=now_s + self._refresh_s)
            threading.Thread(target=self._ask_once, args=(name,), name=f"dns {name}", daemon=True).start()
        stray.waiting.append(answer)

    def _forget(self, now_s: float) -> None:
        self._strays = {
            name: stray for name, stray in self._strays.items() if stray.addresses is None or now_s < stray.until_s
        }

    def poll(self) -> bool:
        """Take what the threads have found; True when a configured name has other addresses than before."""
        refused, self._refused = self._refused, []
        for answer in refused:
            answer(())
        is_changed = False
        while True:
            try:
                is_changed |= self._take(*self._answers.get_nowait())
            except Empty:
                return is_changed

    def _take(self, name: str, addresses: Addresses) -> bool:
        if name in self._names:
            is_changed = bool(addresses) and set(addresses) != set(self._known.get(name, ()))
            if is_changed:  # another order is no news: servers turn it round with every answer
                self._known[name] = addresses
            return is_changed
        stray = self._strays.get(name)
        if stray is not None:
            stray.addresses, waiting, stray.waiting = addresses, stray.waiting, []
            for answer in waiting:
                answer(addresses)
        return False

    # ------------------------------------------------------------ other threads

    def _keep(self, name: str) -> None:
        wait_s = min(_RETRY_S, self._refresh_s)
        while not self._is_over.is_set():
            if self._ask_once(name):
                wait_s = self._refresh_s
            self._is_over.wait(wait_s)

    def _ask_once(self, name: str) -> bool:
        try:
            addresses = self._lookup(name)
        except (OSError, ValueError):  # ValueError: no name at all (UnicodeError)
            addresses = ()
        self._answers.put((name, addresses))
        return bool(addresses)
