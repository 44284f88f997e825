"""The job that brings the LLM's cache in line with a call's context: cut to what is still true, then feed the rest.

What another call computed already is copied instead (kv_cache.PrefixStore), and so is what the call's own listening
branch has read, or the branch at its beginning from the call (listening.py). Where a trained output projector stands,
the hidden states of the caller's turn are kept as they pass, so that a turn fed while the caller spoke need not be fed
again for the voice's query prefix. Which job runs is decided in scheduler.py. Walk: step 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minmo_runtime.api import ContextReused
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.conversation import AudioVector, Conversation, Position
from minmo_runtime.kv_cache import PrefixStore
from minmo_runtime.model.backbone import Backbone, KvCache
from minmo_runtime.reply import ReplyPhase
from minmo_runtime.rows import StreamFailure, each
from minmo_runtime.stream import Stream


@dataclass(eq=False)
class _Row:
    """What one context is fed in this job. `is_branch`: the listening branch, not the call's own context."""

    stream: Stream
    conversation: Conversation
    slot: int
    is_branch: bool
    positions: list[Position] = field(default_factory=list)


class Prefill:
    """Owns the shared beginnings; a call's state is in its stream and its slots."""

    def __init__(self, llm: Backbone, cache: KvCache, config: RuntimeConfig, keeps_rows: bool) -> None:
        """`keeps_rows`: whether somebody reads the hidden states of the caller's turn."""
        self.llm, self.cache, self.keeps_rows = llm, cache, keeps_rows
        self.chunk_tokens = config.prefill_chunk_tokens
        self.prefixes = PrefixStore(cache, config.max_shared_prefixes)
        self.num_positions = 0  # fed in all
        self._first_branch = config.max_streams if len(cache.lengths) > 2 * config.max_streams else -1

    def branch_slot(self, slot: int) -> int:
        """Where the listening branch of the stream in `slot` lies; -1 = there is no room for branches."""
        return slot + self._first_branch if self._first_branch > 0 else -1

    def free(self, slot: int) -> None:
        """The slot's stream has ended."""
        self.prefixes.release(slot)
        if (branch := self.branch_slot(slot)) >= 0:
            self.cache.reset(branch)

    def run(self, streams: list[Stream]) -> dict[str, str]:
        """The next positions of each call's context, at most `prefill_chunk_tokens` in all."""
        rows = [_Row(stream, stream.conversation, stream.slot, False) for stream in streams]
        return self._feed(rows, self._bring_in_line)

    def run_branches(self, streams: list[Stream]) -> dict[str, str]:
        """The same for their listening branches."""
        branches = [(stream, stream.listening.branch) for stream in streams]
        rows = [_Row(stream, branch.conversation, stream.listening.slot, True) for stream, branch in branches if branch]
        return self._feed(rows, self._bring_branch_in_line)

    def _feed(self, contexts: list[_Row], bring_in_line: Callable[[_Row], None]) -> dict[str, str]:
        rows, room = [], self.chunk_tokens
        for row in contexts:
            if room <= 0:
                break
            bring_in_line(row)
            row.positions = list(row.conversation.waiting_ids())[:room]
            if row.positions:
                rows.append(row)
            room -= len(row.positions)
        if not rows:
            return {}
        vectors = input_vectors(self.llm, [row.positions for row in rows])
        num_new = [len(row.positions) for row in rows]
        hidden = self.llm(embeds=vectors, cache=self.cache, slots=[row.slot for row in rows], num_new=num_new)

        def take(index: int, _: Stream) -> None:
            self._take(rows[index], vectors[index], hidden[index, : num_new[index]])

        return each([row.stream for row in rows], take)

    # ------------------------------------------------------- what need not be fed

    def _bring_in_line(self, row: _Row) -> None:
        """Forget what is no longer true of the context; take what the branch or another call has computed."""
        conversation, reply = row.conversation, row.stream.head
        if reply is not None and conversation.opening != "assistant":
            conversation.retarget("assistant")
        needs_last = reply is not None
        limit = len(conversation.target_ids) - needs_last
        keep = conversation.common_prefix(needs_last)
        self._cut(row, keep)
        branch = row.stream.listening.branch
        if branch is not None and branch.is_over:
            self._take_over(row, branch.conversation, row.stream.listening.slot, limit)
            row.stream.listening.drop()
            self._tell(row, "branch", keep)
        keep = len(conversation.cached_ids)
        if shared := self.prefixes.longest(conversation.target_ids, beyond=keep, limit=limit):
            self.prefixes.copy_into(row.slot, shared, start=keep)
            conversation.cached_ids = list(shared.ids)
            self._tell(row, "prefix", keep)
        if reply is not None and reply.wants_query:
            begin, end = conversation.user_span
            end = min(end, len(conversation.cached_ids))
            missing = next((place for place in range(begin, end) if place not in conversation.kept_rows), -1)
            if missing >= 0:
                self._cut(row, missing)

    def _bring_branch_in_line(self, row: _Row) -> None:
        """Forget what is no longer true of it; take what it has in common with the call's own context."""
        self._cut(row, row.conversation.common_prefix(needs_last=False))
        self._take_over(row, row.stream.conversation, row.stream.slot, len(row.conversation.target_ids))

    def _take_over(self, row: _Row, other: Conversation, slot: int, limit: int) -> None:
        """Positions that the context in `slot` has read as this one should."""
        own, start = row.conversation, len(row.conversation.cached_ids)
        end = start
        while end < min(limit, len(other.cached_ids)) and other.cached_ids[end] == own.target_ids[end]:
            end += 1
        if end == start or other.cached_ids[:start] != own.target_ids[:start]:
            return
        for layer in (*self.cache.keys, *self.cache.values):
            layer[row.slot, :, start:end] = layer[slot, :, start:end]
        self.cache.lengths[row.slot] = end
        own.cached_ids = own.target_ids[:end]
        own.kept_rows |= {p: kept for p, kept in other.kept_rows.items() if start <= p < end}

    @staticmethod
    def _tell(row: _Row, source: str, had: int) -> None:
        if gained := len(row.conversation.cached_ids) - had:
            row.stream.emit(ContextReused(call_id=row.stream.call_id, source=source, num_positions=gained))

    def _cut(self, row: _Row, length: int) -> None:
        self.cache.truncate(row.slot, length)
        row.conversation.cut(length)

    # -------------------------------------------------------------- what was read

    def _take(self, row: _Row, vectors: Tensor, hidden: Tensor) -> None:
        """hidden [n, D] of the row's n positions, which the LLM read as `vectors`."""
        conversation = row.conversation
        if not bool(torch.isfinite(hidden).all()):
            raise StreamFailure("the LLM's prefill gave NaN")
        start = len(conversation.cached_ids)
        if self.keeps_rows:
            begin, end = conversation.user_span
            conversation.forget_rows(before=begin)
            for position in range(max(start, begin), min(start + len(row.positions), end)):
                conversation.kept_rows[position] = hidden[position - start], vectors[position - start]
        conversation.cached_ids += row.positions
        self.num_positions += len(row.positions)
        if row.stream.listening.feeds_predictor:
            for place, read in enumerate(row.positions):
                if isinstance(read, AudioVector) and not read.was_predicted_on:
                    read.was_predicted_on = True
                    row.stream.new_frames.append(torch.cat([hidden[place], vectors[place]])[None])
        if row.is_branch:
            return
        for length in conversation.shared_lengths:
            if start < length <= len(conversation.cached_ids):
                self.prefixes.keep(row.slot, conversation.target_ids[:length])
        self._begin_reply(row.stream, hidden[-1])

    @staticmethod
    def _begin_reply(stream: Stream, last_hidden: Tensor) -> None:
        """Where all of the context is read, the reply draws its first token."""
        conversation, reply = stream.conversation, stream.head
        if reply is None or reply.phase is not ReplyPhase.PREFILL or not conversation.is_current():
            return
        if reply.wants_query:
            rows = [conversation.kept_rows[position] for position in range(*conversation.user_span)]
            reply.query_hidden, reply.query_embedding = [h for h, _ in rows], [v for _, v in rows]
            reply.wants_query = False
        reply.hidden = last_hidden
        reply.become(ReplyPhase.DECODING)


def input_vectors(llm: Backbone, rows: Sequence[Sequence[Position]]) -> Tensor:
    """What the LLM reads at these positions, [B, T, D], padded to the longest row."""
    width = max(map(len, rows))
    ids = [[p if isinstance(p, int) else 0 for p in row] + [0] * (width - len(row)) for row in rows]
    vectors = llm.embed(torch.tensor(ids, device=llm.model.embed_tokens.weight.device))
    for index, row in enumerate(rows):
        heard = [(place, p.vector) for place, p in enumerate(row) if isinstance(p, AudioVector)]
        if heard:
            vectors[index, [place for place, _ in heard]] = torch.stack([v for _, v in heard]).to(vectors.dtype)
    return vectors
