"""G.722 as loud as everybody else's: pjmedia's own coder is not.

pjmedia takes 16 bits for 14 and shifts by two before it encodes and after it decodes. Against FFmpeg (and so spandsp,
Asterisk, browsers) what we say is 6 dB too quiet then and what we hear 6 dB too loud; and when a caller was once loud
enough to clip, its `PJMEDIA_G722_STOP_PCM_SHIFT_ON_CLIPPING` takes a step of 6 dB off both for the rest of the call. So
it shall not shift (pjmedia-codec/g722.h), and the 6 dB that are left the other way are put right where the call's
stream meets the bridge: there they saturate, and parties that are joined get them too. Measured by
tests/telephony/test_wideband.py.
"""

from __future__ import annotations

import ctypes

import pjsua2 as pj


def stop_shifting(library: ctypes.CDLL) -> None:
    """Before the first call; pjsua2 has no call for it."""
    if hasattr(library, "pjmedia_codec_g722_set_pcm_shift"):
        library.pjmedia_codec_g722_set_pcm_shift(0)


def put_right(stream: pj.AudioMedia, codec_name: str) -> None:
    """A re-INVITE may have changed the codec, so every one is set."""
    is_g722 = codec_name == "G722"
    stream.adjustTxLevel(2.0 if is_g722 else 1.0)  # pjsua2's Tx: from the party to the bridge
    stream.adjustRxLevel(0.5 if is_g722 else 1.0)
