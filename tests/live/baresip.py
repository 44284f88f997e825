"""baresip (apt: baresip-core) as a caller in the live tests: one process, keys on its stdin, both directions in files.

Its pitfalls (facts of 1.0.0): `net_interface` wants an address; the player of a file ends the call at the end of the
file, so every clip is followed by silence; long commands begin with "/" and end with a new line.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.live.sip_agent import RATE, read_wav, write_wav

MODULES = "/usr/lib/baresip/modules"
CONFIG = """
poll_method epoll
sip_listen 127.0.0.1:{port}
net_interface 127.0.0.1
call_local_timeout 120
call_max_calls 4
audio_source aufile,{source}
audio_player aufile,{folder}/unused.wav
snd_path {folder}
rtp_timeout 0
jitter_buffer_delay 1-3
rtp_ports 20000-40000
module_path {modules}
module stdio.so
module g711.so
module aufile.so
module sndfile.so
module srtp.so
module_tmp uuid.so
module_tmp account.so
module_app menu.so
"""
ACCOUNT = "<sip:{user}@127.0.0.1:{port}>;regint=0;answermode={answer}{more}\n"


class Baresip:
    """One baresip process; keys go to its stdin."""

    def __init__(
        self, folder: Path, source: np.ndarray, dial: str = "", answer: str = "auto", user: str = "baresip",
        quits_after_s: int = 30, port: int = 0, mediaenc: str = "",
    ) -> None:  # fmt: skip
        """`mediaenc`: srtp (offered, accepted) or srtp-mand (RTP/SAVP or nothing)."""
        folder.mkdir(exist_ok=True)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", port))
            self.port = probe.getsockname()[1]
        write_wav(folder / "source.wav", source)
        (folder / "accounts").write_text(ACCOUNT.format(
            user=user, port=self.port, answer=answer, more=f";mediaenc={mediaenc}" if mediaenc else ""
        ))  # fmt: skip
        (folder / "contacts").write_text("")
        (folder / "config").write_text(
            CONFIG.format(port=self.port, source=folder / "source.wav", folder=folder, modules=MODULES)
        )
        command = ["baresip", "-4", "-f", str(folder), "-t", str(quits_after_s)]
        command += ["-e", f"/dial {dial}"] if dial else []
        self.folder = folder
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log)

    def press(self, keys: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(keys.encode())
        self.process.stdin.flush()

    def say(self, clip: np.ndarray) -> None:
        """From now on its source is this clip, then silence: it can answer to what it heard."""
        path = write_wav(self.folder / "say.wav", np.concatenate([clip, silence(120)]))
        self.press(f"/ausrc aufile,{path}\n")

    def text(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def heard(self) -> np.ndarray:
        """What baresip decoded from us."""
        (path,) = self.folder.glob("dump-*-dec.wav")
        return read_wav(path)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.log.close()


@contextlib.contextmanager
def baresip(*arguments, **named) -> Iterator[Baresip]:
    peer = Baresip(*arguments, **named)
    try:
        yield peer
    finally:
        peer.stop()


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * RATE), "<i2")
