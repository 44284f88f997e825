"""Hearing what was recorded: the sound itself, in parts as players ask for it, and how loud it is, for drawing.

    GET /api/calls/{id}/recording      WAV, caller left, agent right; Range is honoured (RFC 9110 §14)
    GET /api/calls/{id}/peaks?bins=    loudness per bin and lane

Both need the right `playback` and are audited before anything is shown. Recordings are named by call id only.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import FastAPI, Header, HTTPException, Query, Request
from fastapi.responses import Response, StreamingResponse

from agent.supervisor import schemas
from agent.supervisor.auth import Right
from agent.supervisor.interventions import checked
from agent.supervisor.rights import Auditor, person_with
from storage.recordings import RecordingReader
from storage.search import CallReader


def add_recordings(app: FastAPI, reader: CallReader, auditor: Auditor) -> None:
    @app.get("/api/calls/{call_id}/peaks", response_model=schemas.Peaks)
    def get_peaks(request: Request, call_id: str, bins: Annotated[int, Query(ge=10, le=2_000)] = 600) -> dict[str, Any]:
        person_with(request, Right.PLAYBACK)
        recording = _recording(reader, call_id)
        auditor.note(request, "peaks", call_id)
        peaks = recording.peaks(bins)
        seconds = recording.num_samples / recording.sample_rate_hz
        return {"seconds": seconds, "caller": [caller for caller, _ in peaks], "agent": [agent for _, agent in peaks]}

    @app.head("/api/calls/{call_id}/recording", response_class=Response, include_in_schema=False)
    @app.get("/api/calls/{call_id}/recording", response_class=Response)
    def get_recording(
        request: Request, call_id: str, range_header: Annotated[str, Header(alias="range")] = ""
    ) -> Response:
        person_with(request, Right.PLAYBACK)
        recording = _recording(reader, call_id)
        if request.method == "GET":
            auditor.note(request, "listen", call_id)
        return _wav_response(recording, range_header, has_body=request.method == "GET")


def _recording(reader: CallReader, call_id: str) -> RecordingReader:
    recording = reader.open_recording(checked(call_id))
    if recording is None:
        raise HTTPException(404, "no recording")
    return recording


def _wav_response(recording: RecordingReader, range_header: str, *, has_body: bool) -> Response:
    size = recording.num_bytes
    headers = {"accept-ranges": "bytes", "content-disposition": 'inline; filename="call.wav"'}
    wanted = parse_range(range_header, size)
    if wanted is None:
        return Response(status_code=416, headers=headers | {"content-range": f"bytes */{size}"})
    first, last = wanted
    headers["content-length"] = str(last - first + 1)
    is_part = range_header.startswith("bytes=") and (first, last) != (0, size - 1)
    if is_part or range_header.startswith("bytes=0-"):
        headers["content-range"] = f"bytes {first}-{last}/{size}"
        is_part = True
    body = recording.read(first, last) if has_body else iter(())
    return StreamingResponse(body, status_code=206 if is_part else 200, media_type="audio/wav", headers=headers)


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """First and last byte (inclusive); the whole when there is no range or several; None when it cannot be satisfied.

    RFC 9110 §14.1.2: "bytes=0-99", "bytes=100-", "bytes=-100" (the last hundred). Examples for size 1000: (0, 99),
    (100, 999), (900, 999).
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header.strip())
    if match is None or match.groups() == ("", ""):
        return 0, size - 1
    first_text, last_text = match.groups()
    if first_text == "":
        length = min(int(last_text), size)
        return (size - length, size - 1) if length else None
    first = int(first_text)
    last = min(int(last_text), size - 1) if last_text else size - 1
    return (first, last) if first <= last else None
