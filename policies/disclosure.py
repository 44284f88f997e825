"""What the caller must be told before anything else: that a machine speaks, and that the call is recorded.

The notice is protected: it is played to its last sample, whatever the caller says meanwhile (still transcribed). EU AI
Act art. 50(1) asks for the first half, consent laws (all-party states, GDPR art. 13) for the second. The decision names
the sentence by its key; the words stand in agent/prompts, where the voice's training corpus finds them too, in a table
that no campaign can change.
"""

from __future__ import annotations

import msgspec

from policies.consent import RecordingDecision


class Disclosure(msgspec.Struct, frozen=True, kw_only=True):
    """line: notice | notice_without_recording."""

    line: str
    reasons: tuple[str, ...]


def disclose(recording: RecordingDecision) -> Disclosure:
    if recording.mode == "off":
        return Disclosure(line="notice_without_recording", reasons=("a machine speaks", "nothing is recorded"))
    return Disclosure(line="notice", reasons=("a machine speaks", f"recording: {recording.mode}"))
