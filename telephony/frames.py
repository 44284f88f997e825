"""From samples of the wire to `AudioFrame`: echo gate, voice activity, tap (walk: hops 2 and 3; tap: recorder,
monitor).

Shared by the worker's client and the loopback leg, so scenario tests hear the caller through the same code as a call
does.
"""

from __future__ import annotations

from collections.abc import Callable

from telephony.config import TelephonyConfig
from telephony.echo import EchoGate
from telephony.leg import AudioFrame
from telephony.voice_activity import VoiceActivity

Tap = Callable[[int, bytes, bytes], None]
"""tap(start_sample, caller_pcm, agent_pcm): reads, and changes nothing."""


class CallerAudio:
    """One leg's received direction."""

    def __init__(self, leg_id: str, config: TelephonyConfig) -> None:
        self._leg_id = leg_id
        self._rate = config.sample_rate_hz
        self._echo = EchoGate(config)
        self._voice_activity = VoiceActivity(config)
        self.tap: Tap | None = None

    def frame(self, start_sample: int, received: bytes, sent: bytes) -> AudioFrame:
        if self.tap is not None:
            self.tap(start_sample, received, sent)
        is_voiced = self._voice_activity.push(received, self._echo.push(received, sent))
        return AudioFrame(
            leg_id=self._leg_id, pcm=received, sample_rate_hz=self._rate, start_sample=start_sample, voiced=is_voiced
        )
