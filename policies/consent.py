"""Whether a call is recorded, and from when.

`after_notice` records nothing before the caller has heard the whole notice; hanging up is how a caller declines.
`always` is for lines where the notice was given before (an announcement by the carrier, a contract). `off` writes no
audio at all. Transcripts are not audio: they are kept in every mode, masked by the store.
"""

from __future__ import annotations

import msgspec

RECORDING_MODES = ("off", "after_notice", "always")  # from least to most


class RecordingDecision(msgspec.Struct, frozen=True, kw_only=True):
    """mode: off | after_notice | always."""

    mode: str
    reasons: tuple[str, ...]

    def may_record(self, *, is_notice_heard: bool) -> bool:
        return self.mode == "always" or (self.mode == "after_notice" and is_notice_heard)


def decide_recording(campaign_mode: str, most: str) -> RecordingDecision:
    """A campaign can record less than the operator allows, never more; `campaign_mode` "" = as much as is allowed."""
    if not campaign_mode:
        return RecordingDecision(mode=most, reasons=(f"operator's setting: {most}",))
    mode = min(campaign_mode, most, key=RECORDING_MODES.index)
    return RecordingDecision(mode=mode, reasons=(f"campaign asks for {campaign_mode}", f"operator allows {most}"))
