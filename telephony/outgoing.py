"""Agent audio on its way to play-out: each item's chunks brought to the leg's rate, filter state kept per item.

Shared by the worker's client and the loopback leg (walk: hop 12). Knows nothing of when anything is played.
"""

from __future__ import annotations

from telephony.leg import Play
from telephony.resample import StreamResampler


class OutgoingAudio:
    """One leg's sent direction, before the ring."""

    def __init__(self, sample_rate_hz: int) -> None:
        self._rate = sample_rate_hz
        self._resamplers: dict[str, StreamResampler] = {}

    def at_leg_rate(self, command: Play) -> Play:
        """The same command with `pcm` at the leg's rate; the final chunk brings what the filter still held."""
        if command.sample_rate_hz == self._rate and command.item_id not in self._resamplers:
            return command
        resampler = self._resamplers.get(command.item_id)
        if resampler is None or resampler.from_hz != command.sample_rate_hz:
            resampler = self._resamplers[command.item_id] = StreamResampler(command.sample_rate_hz, self._rate)
        pcm = resampler.push(command.pcm)
        if command.is_final:
            pcm += resampler.finish()
            self.forget(command.item_id)
        return Play(
            leg_id=command.leg_id,
            item_id=command.item_id,
            pcm=pcm,
            sample_rate_hz=self._rate,
            is_final=command.is_final,
            may_duck=command.may_duck,
        )

    def forget(self, item_id: str = "") -> None:
        """A flushed item's filter is dropped ("" = all)."""
        if item_id:
            self._resamplers.pop(item_id, None)
        else:
            self._resamplers.clear()
