"""A call's RTP comes from one source: locked after the first packets, in the kernel (sip/packet_filter.py).

RFC 3711 is the cure for forged RTP; without SRTP this keeps out everybody who cannot send from the party's own address
and port. Where the party's SDP said its audio would be wins over where the first packets came from, unless the party is
behind NAT (symmetric RTP, RFC 4961), when only the latter is known. A re-INVITE opens the lock for the new address.
"""

from __future__ import annotations

import os
import socket

from telephony.sip import packet_filter

PACKETS_BEFORE_LOCK = 10  # as many as pjmedia itself wants before it follows a source


class RtpLock:
    """One leg's sockets. `lock` and `open` on the main thread."""

    def __init__(self) -> None:
        self._fds: list[tuple[int, int]] = []  # (descriptor, inode): pjsip may have closed it, and the number be reused
        self._drops_before = 0
        self.source = ""  # "ip:port" while locked

    def lock(self, local_port: int, source_address: str) -> None:
        """Only `source_address` ("ip:port") is heard at `local_port`; RTCP from its address alone."""
        host, _, port = source_address.rpartition(":")
        host = host.strip("[]")
        rtp = packet_filter.find_socket(local_port, socket.SOCK_DGRAM)
        rtcp = packet_filter.find_socket(local_port + 1, socket.SOCK_DGRAM)
        if rtp < 0 or not port.isdigit():
            return
        self._drops_before = packet_filter.dropped_packets(rtp)
        packet_filter.attach(rtp, packet_filter.from_one_source(host, int(port)))
        if rtcp >= 0:
            packet_filter.attach(rtcp, packet_filter.from_one_source(host, 0))
        self._fds = [(fd, os.fstat(fd).st_ino) for fd in (rtp, rtcp) if fd >= 0]
        self.source = source_address

    def open(self) -> None:
        for fd, inode in self._fds:
            if _is_same(fd, inode):
                packet_filter.detach(fd)
        self._fds, self.source = [], ""

    def num_refused(self) -> int:
        """Packets kept out since it was locked."""
        if not self._fds or not _is_same(*self._fds[0]):
            return 0
        return packet_filter.dropped_packets(self._fds[0][0]) - self._drops_before


def _is_same(fd: int, inode: int) -> bool:
    try:
        return os.fstat(fd).st_ino == inode
    except OSError:
        return False
