"""What the caller must be told before anything else: that a machine speaks, and that the call is recorded.

The notice is protected: it is played to its last sample, whatever the caller says meanwhile (still transcribed). EU AI Act
art. 50(1) asks for the first half from August 2026, consent laws (all-party states, GDPR art. 13) for the second. A
campaign can put its own words before the notice, never instead of it.
"""

from __future__ import annotations

import msgspec

from policies.consent import RecordingDecision

AI_NOTICE = "you are speaking with an automated assistant."
RECORDING_NOTICE = "this call is recorded."


class Disclosure(msgspec.Struct, frozen=True, kw_only=True):
    greeting: str  # may be interrupted
    notice: str  # may not
    reasons: tuple[str, ...]


def disclose(greeting: str, recording: RecordingDecision) -> Disclosure:
    if recording.mode == "off":
        return Disclosure(greeting=greeting, notice=AI_NOTICE, reasons=("a machine speaks", "nothing is recorded"))
    return Disclosure(
        greeting=greeting,
        notice=f"{AI_NOTICE} {RECORDING_NOTICE}",
        reasons=("a machine speaks", f"recording {recording.mode}"),
    )
