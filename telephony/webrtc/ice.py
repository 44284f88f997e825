"""Where our media may bind: one address, and a range of ports.

aioice gathers host candidates on every interface but loopback and knows no port range. Both are decided here, at the
two places it goes through: its function that lists addresses, and our own event loop's `create_datagram_endpoint`.
Closed by default: without configuration media is reachable from this machine only. Source: RFC 8445 §5.1.1
(gathering).
"""

from __future__ import annotations

import asyncio
import random
import re
from typing import Any

import aioice.ice

_HOST_CANDIDATE = re.compile(r"^(a=candidate:\S+ \d+ \S+ \d+ )(\S+)( \d+ typ host)", re.MULTILINE)


class MediaLoop(asyncio.SelectorEventLoop):
    """An event loop whose UDP sockets for `bind` take ports of the range only."""

    def __init__(self, bind: str, port_first: int, port_last: int) -> None:
        super().__init__()
        self._media_bind = bind
        self._media_ports = range(port_first, port_last + 1) if port_first else range(0)

    async def create_datagram_endpoint(  # type: ignore[override]  # typeshed names options of other platforms
        self, protocol_factory: Any, local_addr: Any = None, **options: Any
    ) -> Any:
        if local_addr != (self._media_bind, 0) or not self._media_ports:
            return await super().create_datagram_endpoint(protocol_factory, local_addr=local_addr, **options)
        for port in random.sample(self._media_ports, len(self._media_ports)):
            try:
                return await super().create_datagram_endpoint(
                    protocol_factory, local_addr=(self._media_bind, port), **options
                )
            except OSError:
                continue  # in use
        raise OSError(f"no UDP port is free from {self._media_ports[0]} to {self._media_ports[-1]}")


def gather_only_on(address: str) -> None:
    """For this process: our only host candidate has this address."""
    aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: [address]


def with_public_address(sdp: str, public_address: str) -> str:
    """The answer with our host candidates as the browser reaches them through 1:1 NAT."""
    if not public_address:
        return sdp
    return _HOST_CANDIDATE.sub(rf"\g<1>{public_address}\g<3>", sdp)
