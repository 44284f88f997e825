"""The echo canceller of libspeexdsp (BSD-3-Clause), called through ctypes: no compiler, no wheel, one small system
library.

`apt-get install libspeexdsp1` brings it; without it `load` says so and the echo gate of telephony/echo.py works alone.
The canceller is Valin's MDF filter with a variable step (arXiv 1602.08044): it keeps adapting while both parties
speak. ctypes lets go of the GIL while it computes. Function names and request numbers are those of
speex/speex_echo.h, version 1.2. Walk: hop 2.
"""

from __future__ import annotations

import ctypes
from functools import cache

LIBRARY = "libspeexdsp.so.1"
_SET_SAMPLING_RATE = 24  # SPEEX_ECHO_SET_SAMPLING_RATE


class SpeexMissing(Exception):
    """The library is not on this machine; the text says how to get it."""


@cache
def load() -> ctypes.CDLL:
    """The library with its signatures declared. SpeexMissing when it is not installed."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        raise SpeexMissing(f"{LIBRARY} is not installed; run: sudo apt-get install libspeexdsp1") from None
    library.speex_echo_state_init.argtypes = [ctypes.c_int, ctypes.c_int]
    library.speex_echo_state_init.restype = ctypes.c_void_p
    library.speex_echo_cancellation.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p]
    library.speex_echo_cancellation.restype = None
    library.speex_echo_state_reset.argtypes = [ctypes.c_void_p]
    library.speex_echo_state_reset.restype = None
    library.speex_echo_ctl.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    library.speex_echo_state_destroy.argtypes = [ctypes.c_void_p]
    library.speex_echo_state_destroy.restype = None
    return library


class SpeexEchoCanceller:
    """One leg's filter. Not for two threads at once."""

    def __init__(self, frame_samples: int, tail_samples: int, rate_hz: int) -> None:
        self._library = load()
        self._frame_bytes = 2 * frame_samples
        self._state = self._library.speex_echo_state_init(frame_samples, tail_samples)
        rate = ctypes.c_int(rate_hz)
        self._library.speex_echo_ctl(self._state, _SET_SAMPLING_RATE, ctypes.byref(rate))
        self._out = ctypes.create_string_buffer(self._frame_bytes)

    def cancel(self, received: bytes, sent: bytes) -> bytes:
        """One frame (int16 mono) without the echo of what was sent up to and with `sent`."""
        assert len(received) == len(sent) == self._frame_bytes, (len(received), len(sent), self._frame_bytes)
        self._library.speex_echo_cancellation(self._state, received, sent, self._out)
        return self._out.raw

    def reset(self) -> None:
        """Forget the line."""
        self._library.speex_echo_state_reset(self._state)

    def __del__(self) -> None:
        state, self._state = getattr(self, "_state", None), None
        if state:
            self._library.speex_echo_state_destroy(state)
