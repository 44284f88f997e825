"""pjsua2's media callbacks: 20 ms out, 20 ms in, handed to the leg that holds the port (hops 1 and 13).

Ports are made once and lent to one call after another, never destroyed: pjmedia's clock thread may be inside a
callback at any time, and SWIG frees a Python-owned port without asking it. While it is lent, each also plays into the
null device, so that pjmedia asks for samples on hold too and the leg's clock never stops. Samples are copied by ctypes
because SWIG's own copies cost 10 to 200 times as much; that depends on libstdc++'s vector layout, which
`check_frame_copy` proves at start.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import traceback

import pjsua2 as pj

from telephony.config import TelephonyConfig
from telephony.leg_media import LegMedia

_this_thread = threading.local()


def _stay_known() -> None:
    """Keep Python's state of this thread of pjmedia's from one callback to the next. SWIG would make it and throw it
    away each time, with memory from the kernel and back to it, a hundred times a second and call.
    """
    if not hasattr(_this_thread, "is_known"):
        ctypes.pythonapi.PyGILState_Ensure()  # one more than is ever released
        _this_thread.is_known = True


class MediaPort(pj.AudioMediaPort):
    """One end of pjmedia's bridge. `media` is whom it serves; setting it is one atomic store."""

    def __init__(self, name: str, config: TelephonyConfig, playback: pj.AudioMedia) -> None:
        super().__init__()
        self.media: LegMedia | None = None
        self._playback = playback
        self._silence = bytes(2 * config.samples_per_frame)
        self._template = pj.ByteVector(len(self._silence), 0)
        audio_format = pj.MediaFormatAudio()
        audio_format.init(pj.PJMEDIA_FORMAT_PCM, config.sample_rate_hz, 1, config.ptime_ms * 1000, 16)
        self.createPort(name, audio_format)

    def start(self, media: LegMedia) -> None:
        self.media = media
        self.startTransmit(self._playback)

    def stop(self) -> None:
        self.media = None
        self.stopTransmit(self._playback)

    def onFrameRequested(self, frame: pj.MediaFrame) -> None:
        _stay_known()
        pcm, media = self._silence, self.media
        try:
            if media is not None:
                pcm = media.request()
        except Exception:  # noqa: BLE001 - must not unwind into pjmedia's C stack: the call goes on in silence
            traceback.print_exc(file=sys.stderr)
        frame.type = pj.PJMEDIA_FRAME_TYPE_AUDIO
        frame.buf = self._template
        frame.size = len(pcm)
        ctypes.memmove(_vector_start(frame.buf), pcm, len(pcm))

    def onFrameReceived(self, frame: pj.MediaFrame) -> None:
        media = self.media
        try:
            if media is not None:
                media.receive(_vector_bytes(frame.buf) if frame.type == pj.PJMEDIA_FRAME_TYPE_AUDIO else b"")
        except Exception:  # noqa: BLE001 - as above
            traceback.print_exc(file=sys.stderr)


class MediaPorts:
    """As many ports as the library holds calls; lent and given back on the main thread."""

    def __init__(self, num_ports: int, config: TelephonyConfig, playback: pj.AudioMedia) -> None:
        self._free = [MediaPort(f"port-{index}", config, playback) for index in range(num_ports)]

    def lend(self, media: LegMedia) -> MediaPort:
        port = self._free.pop()
        try:
            port.start(media)
        except pj.Error:
            self.take_back(port)
            raise
        return port

    def take_back(self, port: MediaPort) -> None:
        try:
            port.stop()
        except pj.Error as error:  # it was not playing; the call's end must be told all the same
            print(f"sip: media port: {error.info(False)}", file=sys.stderr)
        self._free.insert(0, port)  # the longest unused goes next


def _vector_start(vector: pj.ByteVector) -> int:
    """Address of a std::vector's first byte: the first word of the object."""
    start = ctypes.c_void_p.from_address(int(vector.this)).value
    assert start is not None
    return start


def _vector_bytes(vector: pj.ByteVector) -> bytes:
    address = int(vector.this)
    start = ctypes.c_void_p.from_address(address).value
    end = ctypes.c_void_p.from_address(address + 8).value
    return ctypes.string_at(start, end - start) if start and end else b""


def check_frame_copy() -> None:
    """Prove the vector layout on this build before any call depends on it."""
    pattern = bytes(range(64)) * 10
    frame = pj.MediaFrame()
    frame.buf = pj.ByteVector(len(pattern), 0)
    ctypes.memmove(_vector_start(frame.buf), pattern, len(pattern))
    if bytes(frame.buf) != pattern or _vector_bytes(frame.buf) != pattern:
        raise RuntimeError("this pjsua2 build lays out std::vector differently; frames cannot be copied")
