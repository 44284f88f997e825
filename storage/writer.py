"""The one thread that writes to SQL: takes entries that are already in their journal file, commits them in groups.

Behind the journal by at most `group_commit_ms` while the database answers. While it does not (locked, disk full,
server away) the thread keeps trying; memory is bounded, what overflows is read back from the journal files later.
Calls never wait for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from storage import projection
from storage.database import writing
from storage.entries import AnyEntry, CallClosed, JournalUnavailable
from storage.journal import CallJournal

log = logging.getLogger(__name__)
MAX_QUEUED = 50_000  # about 50 MB; beyond it entries stay in their files only until `replay` brings them back
RETRY_S = 0.5


def commit_entries(engine: Engine, entries: list[AnyEntry], refused: set[str] | None = None) -> int:
    """Applies entries in one transaction.

    One that the tables refuse is left out and logged, its call's id added to `refused`. Returns how many were new.
    """
    num_new = 0
    with writing(engine) as connection, connection.begin():
        for entry in entries:
            try:
                with connection.begin_nested():
                    num_new += projection.apply(connection, entry)
            except (sa.exc.IntegrityError, sa.exc.DataError, sa.exc.StatementError) as error:
                if isinstance(error, sa.exc.OperationalError):
                    raise  # the database's trouble, not this entry's: try the whole group again
                log.error(
                    "call %s entry %d (%s) refused by the tables: %s", entry.call_id, entry.seq, entry.kind, error
                )
                if refused is not None:
                    refused.add(entry.call_id)
    return num_new


class Writer:
    """Owns the queue and the thread.

    `put` is called by the store's thread only; `replay` reads the files after an overflow.
    """

    def __init__(self, engine: Engine, *, group_commit_ms: int, replay: Callable[[], list[AnyEntry]]) -> None:
        self._engine = engine
        self._group_commit_s = group_commit_ms / 1_000
        self._replay = replay
        self._queue: deque[tuple[AnyEntry, CallJournal]] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._must_hurry = False
        self._refused: set[str] = set()  # calls whose journal file is kept: it is all there is of some entry
        self._has_overflowed = False
        self._num_unfinished = 0
        self.last_error = ""
        self._thread = threading.Thread(target=self._run, name="storage-writer", daemon=True)
        self._thread.start()

    @property
    def num_behind(self) -> int:
        """Entries that are in the journal but not yet in SQL."""
        return self._num_unfinished

    def put(self, entry: AnyEntry, journal: CallJournal) -> None:
        with self._changed:
            if len(self._queue) >= MAX_QUEUED:
                self._has_overflowed = True
                return
            self._queue.append((entry, journal))
            self._num_unfinished += 1
            self._changed.notify_all()

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Waits until everything put so far is in SQL; false when the database did not answer in time."""
        with self._changed:
            self._must_hurry = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._num_unfinished == 0, timeout_s)

    def stop(self, timeout_s: float = 5.0) -> bool:
        is_done = self.flush(timeout_s)
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return is_done

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_stopping)
                if self._is_stopping:
                    return
                if not self._must_hurry:  # let the group fill
                    self._changed.wait_for(lambda: self._must_hurry or self._is_stopping, self._group_commit_s)
                group = list(self._queue)
            if self._commit(group):
                with self._changed:
                    for _ in group:
                        self._queue.popleft()
                    self._num_unfinished = len(self._queue)
                    self._must_hurry = self._must_hurry and self._num_unfinished > 0
                    self._changed.notify_all()
            else:
                time.sleep(RETRY_S)

    def _commit(self, group: list[tuple[AnyEntry, CallJournal]]) -> bool:
        journals = {id(journal): journal for _, journal in group}.values()
        needs_replay = False
        try:
            for journal in journals:
                journal.sync_if_dirty()
            entries = [entry for entry, _ in group]
            needs_replay = self._has_overflowed
            if needs_replay:
                self._has_overflowed = False
                entries = self._replay()
            commit_entries(self._engine, entries, self._refused)
        except (sa.exc.SQLAlchemyError, JournalUnavailable, OSError) as error:
            if not self.last_error:
                log.error("the database does not take entries (the journal keeps them, trying again): %s", error)
            self.last_error = str(error)
            self._has_overflowed = self._has_overflowed or needs_replay
            return False
        if self.last_error:
            log.warning("the database takes entries again")
            self.last_error = ""
        for entry, journal in group:
            if isinstance(entry, CallClosed):
                journal.close(remove=entry.call_id not in self._refused, is_refused=entry.call_id in self._refused)
                self._refused.discard(entry.call_id)
        return True
