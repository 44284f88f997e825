"""CallStore: the one door through which the agent keeps what happens in its calls.

    store = CallStore(config)                       # creates tables, takes the writer's lock, replays the journals
    store.close_orphans(keep=ids)                   # calls of a dead agent, except those the worker still holds
    store.open_call("c1", did="100", ani="200", now=now)
    recorder = store.start_recording("c1", policy="after_notice", now=now)   # recorder.push("caller", sample, pcm)
    store.answer_call("c1", now=now)
    store.append_turn("c1", "t1", role="caller", heard_text="where is my order", now=now)
    store.record_tool_call("c1", "x1", turn_id="t2", name="look_up_order", arguments={...}, state="requested", now=now)
    order = store.look_up_order("45612")
    store.append_turn("c1", "t2", role="agent", generated_text="it was shipped on wednesday", now=now)
    store.update_turn("c1", "t2", heard_text="it was", cut_offset_samples=8123, was_interrupted=True, now=now)
    store.add_metric("c1", "t2", "voice_to_voice_ms", 640, now=now)
    store.close_call("c1", disposition="completed", cause="normal", ended_by="caller", now=now)
    store.close()

Every method is synchronous and takes the shell's clock as `now` (timezone-aware). **When a writing method has
returned, its entry is acknowledged**: it is in the call's journal file and survives the death of any process.
`open_call`, turns, tool calls, callback requests, delivery changes, defects and `close_call` are on the disk as well
(fsync, some milliseconds); updates of the call, metrics, events and segments follow within `group_commit_ms`. SQL is
behind by about as much: other processes see an entry some 50 ms later, and the reading methods here (`get_call` ...)
wait for it first. The order look-up tools never wait.

All text is masked (masking.py) before it is written anywhere. Knows nothing of telephony, the runtime or policies.
"""

from __future__ import annotations

import datetime as dt
import logging
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from storage import entries as e
from storage import orders, replay
from storage.config import StorageConfig
from storage.database import create_tables, open_database
from storage.entries import JournalUnavailable, StorageError, StorageFull, UnknownCall
from storage.journal import CallJournal
from storage.masking import mask_card_numbers, mask_value
from storage.open_calls import OpenCall, OpenCalls
from storage.projection import UPDATABLE_CALL, UPDATABLE_TURN
from storage.recordings import CallRecorder, RecordingReader, Segment
from storage.search import LINE_EVENT, CallReader
from storage.security import note_security_event
from storage.writer import Writer

__all__ = ["CallStore", "JournalUnavailable", "StorageError", "StorageFull", "UnknownCall"]

log = logging.getLogger(__name__)
_PAUSED, _WENT_ON = "recording_paused", "recording_went_on"  # events of the journal
RECORDING_WAIT_S = 30.0


class CallStore(OpenCalls):
    """See the module. One per agent process; writing methods may be called from any thread."""

    def __init__(self, config: StorageConfig, *, is_background: bool = True) -> None:
        """`is_background=False`: SQL and recordings are written before a method returns (tests in virtual time)."""
        super().__init__()
        self._config = config
        config.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # first: `parents` would give it the usual mode
        config.journal_folder.mkdir(mode=0o700, exist_ok=True)
        self._writer_lock = replay.take_writer_lock(config.journal_folder)
        self.engine = open_database(config)
        create_tables(self.engine)
        self.reader = CallReader(self.engine, config.recording_folder)
        self._orphans = replay.replay_folder(self.engine, config.journal_folder)
        self._writer = None
        self._recording_thread: ThreadPoolExecutor | None = None
        if is_background:
            self._recording_thread = ThreadPoolExecutor(1, thread_name_prefix="storage-recorder")
            self._writer = Writer(
                self.engine,
                group_commit_ms=config.group_commit_ms,
                replay=lambda: replay.read_folder(config.journal_folder),
            )

    # ------------------------------------------------------------------ the call

    def open_call(
        self,
        call_id: str,
        *,
        did: str,
        ani: str,
        now: dt.datetime,
        display_name: str = "",
        direction: str = "inbound",
        campaign: str = "",
        campaign_version: str = "",
        source_address: str = "",
        sample_rate_hz: int = 8_000,
    ) -> None:
        """The first thing said about a call.

        Raises StorageFull when the disk is below its reserve: refuse the call then.
        """
        free = shutil.disk_usage(self._config.journal_folder).free
        if free < self._config.journal_reserve_mib << 20:
            raise StorageFull(
                f"{free >> 20} MiB free, storage.journal_reserve_mib = {self._config.journal_reserve_mib}"
            )
        with self._lock:
            if call_id in self._calls:
                raise StorageError(f"call {call_id} is open already")
            journal = CallJournal.open(self._config.journal_folder, call_id, is_synced=self._config.is_synced)
            party = did if direction == "outbound" else ani  # whom a callback would call
            self._calls[call_id] = OpenCall(journal, 0, 0, ani=party, sample_rate_hz=sample_rate_hz)
        fields = {"did": did, "ani": ani, "display_name": mask_card_numbers(display_name), "direction": direction}
        fields |= {"campaign": campaign, "campaign_version": campaign_version, "source_address": source_address}
        self._append(e.CallOpened, call_id, now, sync=True, sample_rate_hz=sample_rate_hz, **fields)

    def note_line(
        self, call_id: str, *, trunk: str, is_withheld: bool, is_asserted: bool, headers: dict[str, str],
        now: dt.datetime,
    ) -> None:  # fmt: skip
        """By which line it came: the trunk, what is known of the number, and the headers that the campaign reads.

        In the journal, so that databases that are older than this have it too; readers find it as `line` of the call.
        """
        fields = {"trunk": trunk, "is_withheld": is_withheld, "is_asserted": is_asserted, "headers": headers}
        self.journal_append(call_id, LINE_EVENT, now=now, **fields)

    def answer_call(self, call_id: str, *, now: dt.datetime, codec: str = "") -> None:
        self.update_call(call_id, now=now, answered_at=now, codec=codec)

    def update_call(self, call_id: str, *, now: dt.datetime, **fields: Any) -> None:
        _check_fields(fields, UPDATABLE_CALL)
        self._append(e.CallUpdated, call_id, now, fields=fields)

    def close_call(
        self,
        call_id: str,
        *,
        disposition: str,
        cause: str,
        now: dt.datetime,
        ended_by: str = "",
        end_sample: int | None = None,
    ) -> None:
        """The last thing: finishes the recording.

        Nothing can be written afterwards. Closing a closed call does nothing.
        """
        call = self._calls.get(call_id)
        if call is None:
            return
        if call.recorder is not None:
            call.recorder.finish()
            self._wait_for_recordings()
        fields = {"disposition": disposition, "cause": cause, "ended_by": ended_by, "end_sample": end_sample}
        self._append(e.CallClosed, call_id, now, sync=True, **fields)

    def journal_append(self, call_id: str, name: str, *, now: dt.datetime, **fields: Any) -> None:
        """Any other event (floor, duck, key, error ...): fields are builtins. The live page and reviews read it."""
        self._append(e.EventAppended, call_id, now, name=name, fields=self._masked_event(call_id, now, fields))

    def add_defect(self, call_id: str, kind: str, detail: str, *, now: dt.datetime, turn_id: str = "") -> None:
        """Something we did wrong in this call, e.g. kind="watchdog_recover"."""
        masked = mask_card_numbers(detail, is_heard=True)
        self._append(e.DefectAdded, call_id, now, sync=True, kind_of_defect=kind, detail=masked, turn_id=turn_id)

    def record_handoff(
        self, call_id: str, handoff_id: str, *, target: str, state: str, now: dt.datetime, reason: str = "",
        summary: str = "",
    ) -> None:  # fmt: skip
        """A person is called: calling (with what that person is told), then answered, accepted, failed or abandoned."""
        masked = mask_card_numbers(summary, is_heard=True)
        fields = {"handoff_id": handoff_id, "target": target, "state": state, "reason": reason, "summary": masked}
        self._append(e.HandoffRecorded, call_id, now, sync=True, **fields)

    def note_security(
        self, kind: str, source_address: str, *, now: dt.datetime, count: int = 1, detail: str = ""
    ) -> None:
        """What somebody tried, who has no call: straight into SQL (security.py)."""
        masked = mask_card_numbers(detail)
        note_security_event(self.engine, kind, source_address, now=now, count=count, detail=masked)

    # ----------------------------------------------------------------- the turns

    def append_turn(self, call_id: str, turn_id: str, *, role: str, now: dt.datetime, **fields: Any) -> None:
        """A turn of "caller", "agent" or "system", in the order of the conversation; `turn_id` is unique in the call.

        Fields (projection.UPDATABLE_TURN): generated_text, heard_text, start_sample, end_sample, cut_offset_samples,
        confidence, was_interrupted, source (voice | keypad | prompt), intent, slots. For an agent turn heard_text stays
        empty until it is known what was heard.
        """
        with self._lock:
            call = self._open(call_id)
            if turn_id in call.turn_ids:
                raise StorageError(f"call {call_id}: turn {turn_id} was appended already; use update_turn")
            call.turn_ids.add(turn_id)
            position, call.next_position = call.next_position, call.next_position + 1
        masked = _masked_turn(fields)
        self._append(
            e.TurnAppended, call_id, now, sync=True, turn_id=turn_id, position=position, role=role, fields=masked
        )

    def update_turn(self, call_id: str, turn_id: str, *, now: dt.datetime, **fields: Any) -> None:
        """What became known of a turn later, e.g. heard_text and cut_offset_samples after a barge-in."""
        self._append(e.TurnUpdated, call_id, now, sync=True, turn_id=turn_id, fields=_masked_turn(fields))

    def add_metric(
        self, call_id: str, turn_id: str, name: str, value: float, *, now: dt.datetime, source: str = "wire"
    ) -> None:
        """voice_to_voice_ms, first_word_ms, duck_ms, stop_ms, .

        Turn_id "" = of the call. A second value replaces the first.
        """
        self._append(e.MetricAdded, call_id, now, turn_id=turn_id, name=name, value=float(value), source=source)

    # ----------------------------------------------------------------- the tools

    def record_tool_call(
        self,
        call_id: str,
        tool_call_id: str,
        *,
        turn_id: str,
        name: str,
        arguments: dict[str, str],
        state: str,
        now: dt.datetime,
        result: dict[str, Any] | None = None,
    ) -> None:
        """Phase one state="requested", phase two under the same id.

        Done | failed | refused | cancelled, with the result.
        """
        self._append(
            e.ToolCallRecorded,
            call_id,
            now,
            sync=True,
            tool_call_id=tool_call_id,
            turn_id=turn_id,
            name=name,
            arguments=mask_value(arguments, is_heard=True),
            state=state,
            result=mask_value(result),
        )

    def request_callback(self, call_id: str, *, now: dt.datetime, reason: str = "", number: str = "") -> None:
        """A person shall call back `number` (default: the calling party's)."""
        with self._lock:
            ani = self._open(call_id).ani
        # The presented number is kept as it is: it may be as long as a card's, and without it nobody can call back.
        wanted = ani if number in ("", ani) else mask_card_numbers(number)
        masked = mask_card_numbers(reason, is_heard=True)
        self._append(e.CallbackRequested, call_id, now, sync=True, number=wanted, reason=masked)

    def look_up_order(self, order_number: str) -> orders.Order | None:
        with self.engine.connect() as connection:
            return orders.look_up_order(connection, order_number)

    def list_orders(self, *, limit: int = 1_000) -> list[orders.Order]:
        with self.engine.connect() as connection:
            return orders.list_orders(connection, limit=limit)

    def look_up_hours(self, day: str, campaign: str = "") -> orders.OpeningHours | None:
        with self.engine.connect() as connection:
            return orders.look_up_hours(connection, day, campaign)

    def change_delivery(self, call_id: str, order_number: str, day: str, *, now: dt.datetime) -> str:
        """Moves an order that has not left yet to `day`.

        "ok" | unknown_order | unknown_day | too_late. Waits for SQL.
        """
        refusal = orders.delivery_refusal(self.look_up_order(order_number), day)
        if refusal:
            return refusal
        self._append(e.DeliveryChanged, call_id, now, sync=True, order_number=order_number, day=day.strip().lower())
        self.flush()
        return "ok"

    def seed_demo_shop(self) -> int:
        return orders.seed_demo_shop(self.engine)

    # ------------------------------------------------------------- the recording

    def start_recording(self, call_id: str, *, now: dt.datetime, policy: str = "") -> CallRecorder:
        policy = policy or self._config.recording_policy
        with self._lock:
            call = self._open(call_id)
            call.recorder = CallRecorder(
                self._config.recording_folder / call_id,
                sample_rate_hz=call.sample_rate_hz,
                policy=policy,
                segment_s=self._config.recording_segment_s,
                on_segment=lambda segment: self._keep_segment(call_id, segment),
                run=self._run_recording,
            )
        self.update_call(call_id, now=now, recording_policy=policy)
        return call.recorder

    def resume_recording(self, call_id: str, *, now: dt.datetime) -> CallRecorder:
        """After `adopt_call`: goes on under the call's own policy. The segment that was open at the death is lost."""
        self.flush()
        row = self.reader.get_call(call_id)
        recorder = self.start_recording(call_id, policy=row["recording_policy"], now=now)
        if row["notice_end_sample"] is not None:
            recorder.notice_finished(row["notice_end_sample"])
        for name, sample in self.reader.get_recording_pauses(call_id):
            (recorder.pause if name == _PAUSED else recorder.go_on)(sample)
        return recorder

    def pause_recording(self, call_id: str, sample: int, *, now: dt.datetime, by: str = "") -> None:
        """Nothing from leg sample `sample` on is kept until `go_on_recording`; also after a death of this process.

        `by`: who wanted it; it stands in the journal.
        """
        self._switch_recording(call_id, _PAUSED, sample, now, by)

    def go_on_recording(self, call_id: str, sample: int, *, now: dt.datetime, by: str = "") -> None:
        self._switch_recording(call_id, _WENT_ON, sample, now, by)

    def _switch_recording(self, call_id: str, name: str, sample: int, now: dt.datetime, by: str) -> None:
        with self._lock:
            recorder = self._open(call_id).recorder
        if recorder is not None:
            (recorder.pause if name == _PAUSED else recorder.go_on)(sample)
        self._append(e.EventAppended, call_id, now, sync=True, name=name, fields={"sample": sample, "by": by})

    def notice_finished(self, call_id: str, sample: int, *, now: dt.datetime) -> None:
        with self._lock:
            recorder = self._open(call_id).recorder
        if recorder is not None:
            recorder.notice_finished(sample)
        self.update_call(call_id, now=now, notice_end_sample=sample)

    def open_recording(self, call_id: str) -> RecordingReader | None:
        self.flush()
        return self.reader.open_recording(call_id)

    # ---------------------------------------------------------- after a restart

    def orphans(self) -> list[replay.Orphan]:
        """Calls that were open when the last agent died, with what is needed to go on or to close them."""
        return list(self._orphans.values())

    def adopt_call(self, call_id: str) -> None:
        """This process goes on with an orphan (the worker offered it again): writing continues after its last entry."""
        orphan = self._orphans.pop(call_id, None)
        if orphan is None:
            raise UnknownCall(f"{call_id}: not an open call of an earlier process")
        journal = CallJournal.open(self._config.journal_folder, call_id, is_synced=self._config.is_synced)
        self._calls[call_id] = OpenCall(
            journal,
            orphan.next_seq,
            orphan.next_position,
            ani=orphan.ani,
            sample_rate_hz=orphan.sample_rate_hz,
            last_at=orphan.last_at,
            turn_ids=set(orphan.turn_ids),
        )

    def close_orphans(self, *, cause: str = "agent_lost", keep: Collection[str] = ()) -> list[str]:
        """Closes what nobody goes on with, at the time of its last entry.

        Returns the ids. `keep`: may still be adopted.
        """
        closed = [call_id for call_id in self._orphans if call_id not in keep]
        for call_id in closed:
            last_at = self._orphans[call_id].last_at
            self.adopt_call(call_id)
            self.close_call(call_id, disposition="failed", cause=cause, ended_by="us", now=last_at)
        self.flush()
        return closed

    # ------------------------------------------------------------------ reading

    def get_call(self, call_id: str) -> dict[str, Any]:
        self.flush()
        return self.reader.get_call(call_id)

    def get_transcript(self, call_id: str) -> list[dict[str, Any]]:
        self.flush()
        return self.reader.get_transcript(call_id)

    def list_calls(self, **filters: Any) -> list[dict[str, Any]]:
        self.flush()
        return self.reader.list_calls(**filters)

    # ------------------------------------------------------------------- ending

    def close(self) -> None:
        """Commits what is left and gives the writer's lock back. Open calls stay open in the journal."""
        self._wait_for_recordings()
        if self._recording_thread is not None:
            self._recording_thread.shutdown()
        if self._writer is not None:
            self._writer.stop()
        for call in self._calls.values():
            call.journal.close()
        self._calls.clear()
        self.engine.dispose()
        self._writer_lock.close()

    # ------------------------------------------------------------------- inside

    def _keep_segment(self, call_id: str, segment: Segment) -> None:
        call = self._calls.get(call_id)
        if call is None:
            return
        now = call.last_at
        assert now is not None, call_id  # open_call came first
        fields = {name: getattr(segment, name) for name in Segment.__dataclass_fields__}
        self._append(e.RecordingSegmentAdded, call_id, now, **fields)

    def _run_recording(self, write: Callable[[], None]) -> None:
        if self._recording_thread is None:
            write()
        else:
            self._recording_thread.submit(write)

    def _wait_for_recordings(self) -> None:
        if self._recording_thread is not None:
            try:
                self._recording_thread.submit(lambda: None).result(RECORDING_WAIT_S)
            except TimeoutError:  # a disk that hangs must not keep a call from being closed
                log.error("recordings are not written in time")


def _check_fields(fields: dict[str, Any], allowed: frozenset[str]) -> None:
    unknown = set(fields) - allowed
    if unknown:
        raise StorageError(f"unknown field {', '.join(sorted(unknown))}: allowed are {', '.join(sorted(allowed))}")


def _masked_turn(fields: dict[str, Any]) -> dict[str, Any]:
    _check_fields(fields, UPDATABLE_TURN)
    masked: dict[str, Any] = mask_value(fields, is_heard=True)
    return masked
