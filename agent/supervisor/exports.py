"""Lists of calls to take away, as CSV or JSON. Each is audited before its first byte leaves."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response, StreamingResponse

from agent.supervisor.auth import Right
from agent.supervisor.rights import person_with
from agent.supervisor.schemas import UtcTime
from storage.audit import append_audit
from storage.export import WRITERS, CallFilter
from storage.search import CallReader

MEDIA_TYPES = {"csv": "text/csv; charset=utf-8", "json": "application/json"}


def add_exports(app: FastAPI, reader: CallReader, clock: Callable[[], dt.datetime]) -> None:
    @app.get("/api/export/calls.{kind}", response_class=StreamingResponse)
    def export(
        request: Request,
        kind: Literal["csv", "json"],
        text: Annotated[str, Query(max_length=200)] = "",
        campaign: Annotated[str, Query(max_length=64)] = "",
        disposition: Annotated[str, Query(max_length=32)] = "",
        state: Literal["open", "closed"] | None = None,
        since: UtcTime | None = None,
        until: UtcTime | None = None,
    ) -> Response:
        """Every call that fits, newest first; needs the right `export`."""
        person = person_with(request, Right.EXPORT)
        wanted = CallFilter(
            text=text, campaign=campaign, disposition=disposition, is_open=None if state is None else state == "open",
            since=since, until=until,
        )  # fmt: skip
        now = clock()
        filters = {key: str(value) for key, value in request.query_params.items()}
        append_audit(reader.engine, person.name, "export", now=now, format=kind, filters=filters)
        name = f"calls-{now:%Y%m%d-%H%M%S}.{kind}"
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return StreamingResponse(WRITERS[kind](reader, wanted), media_type=MEDIA_TYPES[kind], headers=headers)
