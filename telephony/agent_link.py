"""The worker's end of the Unix socket: one agent at a time, never a blocking call.

Lies in a folder only we may enter (0700) and takes only peers of our own user id. Outgoing messages wait in a bounded
queue; an agent that leaves more than `_MAX_UNSENT_BYTES` unread is treated as lost. Belongs to the thread that made it:
the worker's main one.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections import deque
from pathlib import Path

import msgspec

from telephony.wire import FrameBuffer, ToWorker, decode_to_worker, frame

_MAX_UNSENT_BYTES = 1 << 22
_UCRED = struct.Struct("3i")


class AgentLink:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.parent.stat().st_mode & 0o077:
            raise PermissionError(f"{path.parent} can be entered by others; it must have mode 0700")
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(2)
        self._listener.setblocking(False)
        self._agent: socket.socket | None = None
        self._buffer = FrameBuffer()
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._unsent_bytes = 0
        self._thread_id = threading.get_ident()

    @property
    def is_connected(self) -> bool:
        return self._agent is not None

    def accept(self) -> bool:
        """True when a new agent has come. A second one beside a living one is sent away."""
        try:
            peer, _ = self._listener.accept()
        except BlockingIOError:
            return False
        user_id = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1]
        if self._agent is not None or user_id != os.getuid():
            peer.close()
            return False
        peer.setblocking(False)
        self._agent, self._buffer = peer, FrameBuffer()
        self._unsent.clear()
        self._unsent_bytes = 0
        return True

    def receive(self) -> tuple[list[ToWorker], bool]:
        """(messages, is the agent still there). Something that is not ours ends the connection."""
        messages: list[ToWorker] = []
        try:
            while self._agent is not None:
                received = self._agent.recv(1 << 16)
                if not received:
                    self.drop()
                    break
                messages += [decode_to_worker(body) for body in self._buffer.push(received)]
        except BlockingIOError:
            pass
        except (OSError, ValueError, msgspec.DecodeError):
            self.drop()
        return messages, self._agent is not None

    def send(self, message: msgspec.Struct, fds: tuple[int, ...] = ()) -> None:
        assert threading.get_ident() == self._thread_id, f"{type(message).__name__} sent from another thread"
        if self._agent is None:
            return
        data = frame(message)
        self._unsent.append((data, list(fds)))
        self._unsent_bytes += len(data)
        if self._unsent_bytes > _MAX_UNSENT_BYTES:
            self.drop()
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now."""
        try:
            while self._agent is not None and self._unsent:
                data, fds = self._unsent[0]
                sent = socket.send_fds(self._agent, [data], fds) if fds else self._agent.send(data)
                self._unsent_bytes -= sent
                if sent == len(data):
                    self._unsent.popleft()
                else:
                    self._unsent[0] = (data[sent:], [])
        except BlockingIOError:
            pass
        except OSError:
            self.drop()

    def drop(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        self._unsent.clear()
        self._unsent_bytes = 0
