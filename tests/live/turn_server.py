"""coturn (apt: coturn) as operators run it for us: a shared secret, credentials that end by themselves; on loopback."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REALM = "minmo.test"
SECRET = "a-secret-shared-with-coturn"
_UP_WITHIN_S = 10.0


@dataclass(frozen=True)
class TurnServer:
    address: tuple[str, int]
    secret_file: Path
    log: Path

    @property
    def url(self) -> str:
        return f"turn:{self.address[0]}:{self.address[1]}?transport=udp"


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def turn_server(folder: Path) -> Iterator[TurnServer]:
    folder.mkdir(parents=True, exist_ok=True)
    port, secret_file, log = _free_port(), folder / "secret", folder / "turnserver.log"
    secret_file.write_text(SECRET)
    command = [
        "turnserver", "-n", "--listening-ip=127.0.0.1", "--relay-ip=127.0.0.1", f"--listening-port={port}",
        "--use-auth-secret", f"--static-auth-secret={SECRET}", f"--realm={REALM}", "--allow-loopback-peers",
        "--no-tls", "--no-dtls", "--no-cli", "--no-multicast-peers", "--verbose", "--log-file=stdout",
        "--simple-log", f"--pidfile={folder / 'pid'}", f"--userdb={folder / 'turndb'}",
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder)
    try:
        _wait_until_up(process, port, log)
        yield TurnServer(("127.0.0.1", port), secret_file, log)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """A STUN binding request (RFC 5389 §6) is answered."""
    request = b"\x00\x01\x00\x00\x21\x12\xa4\x42" + b"minmo-turn-t"
    deadline_s = time.monotonic() + _UP_WITHIN_S
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.settimeout(0.3)
        while time.monotonic() < deadline_s and process.poll() is None:
            with contextlib.suppress(OSError):
                probe.sendto(request, ("127.0.0.1", port))
                if probe.recv(1024)[8:20] == request[8:20]:
                    return
    raise RuntimeError(f"coturn is not up: {log.read_text()[-2000:]}")
