"""The gate of a worker's SIP port: who is not listed gets no reply, no row, and one event.

Beside pjsip's UDP socket stands a second one at the same port, which never answers. The kernel gives each packet to
one of the two by its source (sip/packet_filter.py), so pjsip parses nothing that a stranger sends, and a scan learns
not even that somebody listens. What arrives here is counted, not kept. TCP connections of strangers are dropped at
their SYN.
"""

from __future__ import annotations

import ipaddress
import socket

from telephony.security_log import SecurityLog
from telephony.sip import packet_filter
from telephony.sip.packet_filter import Network

_PER_POLL = 32  # packets looked at in one turn; the kernel throws the rest away
_BUFFER_BYTES = 1 << 16


class Gate:
    """Owned by the endpoint. `close_to` may be called again when the list has changed."""

    def __init__(self, address: str, port: int, tls_port: int, transports: tuple[str, ...], log: SecurityLog) -> None:
        self._log = log
        self._udp = packet_filter.find_socket(port, socket.SOCK_DGRAM) if "udp" in transports else -1
        listening = [number for name, number in (("tcp", port), ("tls", tls_port)) if name in transports]
        self._tcp = [packet_filter.find_socket(it, socket.SOCK_STREAM, is_listening=True) for it in listening]
        self._trap: socket.socket | None = None
        if self._udp >= 0:
            self._trap = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
            self._trap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            self._trap.setsockopt(socket.SOL_SOCKET, packet_filter.SO_REUSEPORT, 1)
            self._trap.bind((address, port))
            self._trap.setblocking(False)
        self._networks: list[Network] = []

    def close_to(self, networks: list[Network]) -> None:
        """Let only these in."""
        if networks == self._networks:
            return
        self._networks = networks
        if self._udp >= 0:
            packet_filter.steer(self._udp, packet_filter.by_source(networks, 0, 1))
        for fd in self._tcp:
            packet_filter.attach(fd, packet_filter.by_source(networks, 0xFFFFFFFF, 0))

    def poll(self, now_s: float) -> None:
        """Look at what strangers sent."""
        if self._trap is None:
            return
        for _ in range(_PER_POLL):
            try:
                packet, (host, *_) = self._trap.recvfrom(512)
            except BlockingIOError:
                return
            first_line = packet.split(b"\r\n", 1)[0].decode("utf-8", "replace")
            self._log.note("unlisted_source", str(ipaddress.ip_address(host.split("%")[0])), first_line, now_s)


def is_port_free(address: str, port: int, transports: tuple[str, ...]) -> bool:
    """Asked before binding with SO_REUSEPORT, which would share the port of another worker without a word."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for name, kind in (("udp", socket.SOCK_DGRAM), ("tcp", socket.SOCK_STREAM)):
        if name not in transports:
            continue
        with socket.socket(family, kind) as probe:
            if kind is socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True
