"""Which wording of a campaign a call was answered with: the content is kept once per version, calls refer to it.

A version is the SHA-256 of the file's text, so an unchanged campaign has one row however often it is loaded.
"""

from __future__ import annotations

import datetime as dt
import hashlib

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from storage.database import insert_new, writing
from storage.tables import campaign_versions


def keep_campaign_version(engine: Engine, campaign: str, content: str, *, now: dt.datetime) -> str:
    """Returns the version to put into the calls' rows."""
    version = hashlib.sha256(content.encode()).hexdigest()
    row = {"campaign": campaign, "version": version, "content": content, "first_used_at": now}
    with writing(engine) as connection, connection.begin():
        insert_new(connection, campaign_versions, row)
    return version


def get_campaign_version(engine: Engine, campaign: str, version: str) -> str | None:
    c = campaign_versions.c
    with engine.connect() as connection:
        found: str | None = connection.execute(
            sa.select(c.content).where(c.campaign == campaign, c.version == version)
        ).scalar()
        return found
