"""From samples of the wire to what the agent is told about the caller: echo removal, voice activity (walk: hops 2, 3).

Runs where the samples are, in the media worker (telephony/leg_media.py) and in the loopback leg, so that the duck needs
neither the agent nor its loop, and scenario tests hear the caller through the same code as a call does.
"""

from __future__ import annotations

from collections.abc import Callable

from telephony.config import TelephonyConfig
from telephony.echo import LineEcho
from telephony.leg import AudioFrame, EchoMeasured
from telephony.voice_activity import VoiceActivity

Tap = Callable[[int, bytes, bytes], None]
"""tap(start_sample, caller_pcm, agent_pcm): reads, and changes nothing. Both as they crossed the wire, echo and all."""


class CallerAudio:
    """One leg's received direction."""

    def __init__(self, config: TelephonyConfig) -> None:
        self._echo = LineEcho(config)
        self._voice_activity = VoiceActivity(config)

    def answered(self, leg_id: str) -> None:
        """From now on our voice is heard at the other end, and may come back: that is measured, once."""
        self._echo.measure_return(leg_id)

    def take_measured(self) -> EchoMeasured | None:
        """What came of it, once."""
        return self._echo.take_measured()

    def listen(self, received: bytes, sent: bytes) -> tuple[bytes, bool]:
        """One tick: the received samples without our echo, and whether the caller speaks."""
        cleaned, is_echo = self._echo.push(received, sent)
        return cleaned, self._voice_activity.push(cleaned, is_echo)


def audio_frame(leg_id: str, rate_hz: int, start_sample: int, cleaned: bytes, is_voiced: bool) -> AudioFrame:
    return AudioFrame(leg_id=leg_id, pcm=cleaned, sample_rate_hz=rate_hz, start_sample=start_sample, voiced=is_voiced)
