"""The shapes of the page's JSON answers. Times are ISO 8601 with zone; positions are samples of the leg's clock.

Texts are as they came: a display name or a caller's words are an attacker's, so whoever shows them escapes them. No
answer holds a path of the server.
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict


def _in_utc(at: dt.datetime) -> dt.datetime:
    """Without a zone it is UTC; a time that no calendar has there is refused like any other wrong parameter."""
    try:
        return at.replace(tzinfo=dt.UTC) if at.tzinfo is None else at.astimezone(dt.UTC)
    except OverflowError:
        raise ValueError("out of range") from None


UtcTime = Annotated[dt.datetime, AfterValidator(_in_utc)]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore")


class CallSummary(_Answer):
    call_id: str
    did: str
    ani: str
    display_name: str
    direction: str
    campaign: str
    started_at: dt.datetime
    answered_at: dt.datetime | None
    ended_at: dt.datetime | None
    state: str
    disposition: str
    cause: str
    ended_by: str
    num_turns: int = 0


class CallList(_Answer):
    calls: list[CallSummary]


class Turn(_Answer):
    turn_id: str
    position: int
    role: str
    at: dt.datetime
    generated_text: str | None
    heard_text: str | None
    cut_offset_samples: int | None
    start_sample: int | None
    end_sample: int | None
    confidence: float | None
    was_interrupted: bool
    source: str
    intent: str
    slots: Any
    metrics: dict[str, float]


class ToolCall(_Answer):
    tool_call_id: str
    turn_id: str
    name: str
    arguments: dict[str, Any]
    state: str
    result: Any
    requested_at: dt.datetime
    finished_at: dt.datetime | None


class CallbackRequest(_Answer):
    number: str
    reason: str
    at: dt.datetime
    done_at: dt.datetime | None


class Defect(_Answer):
    kind: str
    detail: str
    turn_id: str
    at: dt.datetime


class Handoff(_Answer):
    """A person who was called to take the call over, and what that person was told."""

    target: str
    state: str
    reason: str
    summary: str
    begun_at: dt.datetime
    ended_at: dt.datetime | None


class Metric(_Answer):
    turn_id: str
    name: str
    value: float
    source: str


class Recording(_Answer):
    num_samples: int
    sample_rate_hz: int


class Line(_Answer):
    """By which line a call came, and what it claims of the caller: `headers` are those that the campaign reads."""

    trunk: str
    is_withheld: bool
    is_asserted: bool
    headers: dict[str, str]


class CallDetail(CallSummary):
    source_address: str
    line: Line | None = None
    campaign_version: str
    end_sample: int | None
    sample_rate_hz: int
    codec: str
    checkpoint: str
    bridges: list[str] | None
    style: dict[str, Any] | None
    language: str
    recording_policy: str
    notice_end_sample: int | None
    turns: list[Turn]
    metrics: list[Metric]
    tool_calls: list[ToolCall]
    callback_requests: list[CallbackRequest]
    defects: list[Defect]
    handoffs: list[Handoff]
    recording: Recording | None


class SecurityEvent(_Answer):
    """What somebody tried who has no call; of one kind and source, one row an hour."""

    kind: str
    source_address: str
    first_at: dt.datetime
    last_at: dt.datetime
    count: int
    detail: str


class SecurityEventList(_Answer):
    events: list[SecurityEvent]


class Event(_Answer):
    seq: int
    at: dt.datetime
    kind: str
    payload: Any


class EventList(_Answer):
    events: list[Event]


class Peaks(_Answer):
    """Loudest sample per bin, 0..1, for drawing; both lists have the same length."""

    seconds: float
    caller: list[float]
    agent: list[float]


class Percentiles(_Answer):
    name: str
    n: int
    p50: float
    p95: float


class Summary(_Answer):
    num_open_calls: int
    latencies: list[Percentiles]  # of the last `hours`
    hours: int
    num_unmeasured_calls: int  # that ended in them and have answers without a latency
    num_unmeasured_turns: int


class BrowserCalls(_Answer):
    is_on: bool
    off_because: str
    did: str  # "" = the page asks which number is dialled


class Me(_Answer):
    name: str
    rights: list[str]
    browser_calls: BrowserCalls


class BrowserCallToken(_Answer):
    token: str
    expires_in_s: int
    ice_servers: list[dict[str, Any]]  # RTCIceServer of W3C webrtc-pc
    ice_transport_policy: str = "all"  # RTCIceTransportPolicy: all | relay


class BrowserCallAnswer(_Answer):
    call_id: str
    sdp: str


class DialledCall(_Answer):
    """The call exists; GET /api/calls/{call_id} tells what becomes of it."""

    call_id: str
    is_new: bool  # false: this request_id was asked before


class DialRefusal(_Answer):
    error: str  # in words
    code: str  # of agent/dial_socket.NotDialled
