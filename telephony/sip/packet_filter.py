"""Linux's own packet filters on our sockets: who is not listed is not heard, and costs nothing (socket(7), bpf(4)).

Classic BPF: no privilege is needed for one's own sockets. Three uses: unlisted UDP packets are
steered to a socket of ours that never answers (SO_ATTACH_REUSEPORT_CBPF), unlisted TCP connections find nobody
(SO_ATTACH_FILTER drops their SYN), and a call's RTP that is not of its own source comes to us. Elsewhere than on Linux
these are not there, and `sip/trunk.py` refuses unlisted INVITEs with 403 instead.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterable

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Instruction = tuple[int, int, int, int]
IS_AVAILABLE = sys.platform == "linux"

_SO_ATTACH_FILTER, _SO_DETACH_FILTER, _SO_ATTACH_REUSEPORT_CBPF, SO_REUSEPORT = 26, 27, 51, 15
_NET_OFFSET = 0xFFF00000  # SKF_NET_OFF: from the IP header on, wherever the packet pointer stands
_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE = 0x20, 0x28, 0x30
_AND, _EQUAL, _RETURN = 0x54, 0x15, 0x06
_SHIFT_RIGHT, _JUMP = 0x74, 0x05
_IPV4_SOURCE, _IPV6_SOURCE = 12, 8
_MAX_INSTRUCTIONS = 4096


def by_source(networks: Iterable[Network], listed: int, others: int) -> list[Instruction]:
    """Return `listed` for packets of these networks, else `others`. The version decides which header is read."""
    networks = list(networks)
    program: list[Instruction] = []
    for version in (4, 6):
        block: list[Instruction] = []
        for network in networks:
            if network.version == version:
                block += _matches(network, listed)
        block.append((_RETURN, 0, 0, others))
        # The version is in the first nibble. A conditional jump reaches 255 instructions only, so it skips an
        # unconditional one, over the block.
        program += [(_LOAD_BYTE, 0, 0, _NET_OFFSET), (_SHIFT_RIGHT, 0, 0, 4), (_EQUAL, 1, 0, version)]
        program += [(_JUMP, 0, 0, len(block)), *block]
    program.append((_RETURN, 0, 0, others))
    if len(program) > _MAX_INSTRUCTIONS:
        raise ValueError(f"too many networks for one filter: {len(program)} instructions, at most {_MAX_INSTRUCTIONS}")
    return program


def _matches(network: Network, verdict: int) -> list[Instruction]:
    """Compare the source word by word and return `verdict`; fall through when it is another."""
    offset = _IPV4_SOURCE if network.version == 4 else _IPV6_SOURCE
    address, mask = network.network_address.packed, network.netmask.packed
    words = [
        (offset + at, *struct.unpack("!II", mask[at : at + 4] + address[at : at + 4])) for at in range(0, len(mask), 4)
    ]
    words = [word for word in words if word[1]]
    program: list[Instruction] = []
    for index, (at, word_mask, value) in enumerate(words):
        left = 3 * (len(words) - index - 1) + 1  # instructions after this comparison, up to and with the return
        program += [(_LOAD_WORD, 0, 0, _NET_OFFSET + at), (_AND, 0, 0, word_mask), (_EQUAL, 0, left, value)]
    return [*program, (_RETURN, 0, 0, verdict)]


def from_one_source(address: str, port: int, own: int = 0xFFFFFFFF, others: int = 0) -> list[Instruction]:
    """Return `own` for packets of this address and UDP port (0 = any port), else `others`."""
    network = ipaddress.ip_network(address)
    if not port:
        return by_source([network], own, others)
    # A packet with IP options or extension headers has its port elsewhere; no RTP has them.
    plain = (0, 0x45, 20) if network.version == 4 else (6, socket.IPPROTO_UDP, 40)
    at, value, header_bytes = plain
    return [
        (_LOAD_BYTE, 0, 0, _NET_OFFSET + at), (_EQUAL, 1, 0, value), (_RETURN, 0, 0, others),
        (_LOAD_HALF, 0, 0, _NET_OFFSET + header_bytes), (_EQUAL, 1, 0, port), (_RETURN, 0, 0, others),
        *by_source([network], own, others),
    ]  # fmt: skip


def attach(fd: int, program: list[Instruction]) -> None:
    _attach(fd, _SO_ATTACH_FILTER, program)


def detach(fd: int) -> None:
    with _socket_of(fd) as own:
        try:
            own.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        except OSError:  # there was none
            return


def steer(fd: int, program: list[Instruction]) -> None:
    """The program's return value is the index, in order of bind, of the socket that gets the packet."""
    _attach(fd, _SO_ATTACH_REUSEPORT_CBPF, program)


def _attach(fd: int, option: int, program: list[Instruction]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    with _socket_of(fd) as own:
        own.setsockopt(socket.SOL_SOCKET, option, struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))


def _socket_of(fd: int) -> socket.socket:
    """A Python socket on a descriptor of somebody else; closing it leaves theirs open. OSError for no socket."""
    own = os.dup(fd)
    try:
        return socket.socket(fileno=own)
    except BaseException:
        os.close(own)  # else each search would leave one behind for each file and pipe it passes
        raise


def socket_beside(fd: int, buffer_bytes: int) -> socket.socket:
    """A non-blocking socket of ours at the address of this UDP socket, second in order: see `steer`.

    SO_REUSEPORT is set after the other one was bound, so that its own bind was refused where the port was taken.
    """
    with _socket_of(fd) as first:
        first.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 1)
        second = socket.socket(first.family, socket.SOCK_DGRAM)
        try:
            second.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 1)
            second.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            second.setblocking(False)
            second.bind(first.getsockname())
        except BaseException:
            second.close()
            raise
        return second


def find_socket(port: int, kind: socket.SocketKind, *, is_listening: bool = False) -> int:
    """The descriptor, among this process's own, of the socket bound to this local port; -1 when there is none."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            with _socket_of(fd) as own:
                is_it = own.type == kind and own.getsockname()[1] == port and own.family != socket.AF_UNIX
                if is_it and (not is_listening or own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
                    return fd
        except (OSError, IndexError, TypeError):  # closed meanwhile, or not a socket with a port
            continue
    return -1
