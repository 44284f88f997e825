"""The job that brings the LLM's cache in line with a call's context: cut to what is still true, then feed the rest.

What another call computed already is copied instead (kv_cache.PrefixStore). Where a trained output projector stands,
the hidden states of the caller's turn are kept as they pass, so that a turn fed while the caller spoke need not be fed
again for the voice's query prefix. Which job runs is decided in scheduler.py. Walk: step 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minmo_runtime.config import RuntimeConfig
from minmo_runtime.conversation import AudioVector, Position
from minmo_runtime.kv_cache import PrefixStore
from minmo_runtime.model.backbone import Backbone, KvCache
from minmo_runtime.reply import ReplyPhase
from minmo_runtime.rows import StreamFailure, each
from minmo_runtime.stream import Stream


class Prefill:
    """Owns the shared beginnings; a call's state is in its stream and its slot."""

    def __init__(self, llm: Backbone, cache: KvCache, config: RuntimeConfig, keeps_rows: bool) -> None:
        """`keeps_rows`: whether somebody reads the hidden states of the caller's turn."""
        self.llm, self.cache, self.keeps_rows = llm, cache, keeps_rows
        self.chunk_tokens = config.prefill_chunk_tokens
        self.prefixes = PrefixStore(cache, config.max_shared_prefixes)
        self.num_positions = 0  # fed in all

    def free(self, slot: int) -> None:
        """The slot's stream has ended."""
        self.prefixes.release(slot)

    def run(self, streams: list[Stream]) -> dict[str, str]:
        """The next positions of each context, at most `prefill_chunk_tokens` in all."""
        rows: list[tuple[Stream, list[Position]]] = []
        room = self.chunk_tokens
        for stream in streams:
            if room <= 0:
                break
            self._cut_to_prefix(stream)
            if positions := list(stream.conversation.waiting_ids())[:room]:
                rows.append((stream, positions))
            room -= len(positions)
        if not rows:
            return {}
        vectors = input_vectors(self.llm, [positions for _, positions in rows])
        slots, num_new = [stream.slot for stream, _ in rows], [len(positions) for _, positions in rows]
        hidden = self.llm(embeds=vectors, cache=self.cache, slots=slots, num_new=num_new)

        def take(row: int, stream: Stream) -> None:
            self._take(stream, rows[row][1], vectors[row], hidden[row, : num_new[row]])

        return each([stream for stream, _ in rows], take)

    def _cut_to_prefix(self, stream: Stream) -> None:
        """Forget what is no longer true of the context, and take what another call has computed."""
        conversation, reply = stream.conversation, stream.head
        if reply is not None and conversation.opening != "assistant":
            conversation.retarget("assistant")
        needs_last = reply is not None
        keep = conversation.common_prefix(needs_last)
        if reply is not None and reply.wants_query:
            begin, end = conversation.user_span
            keep = next((p for p in range(begin, min(keep, end)) if p not in conversation.kept_rows), keep)
        self.cache.truncate(stream.slot, keep)
        conversation.cut(keep)
        limit = len(conversation.target_ids) - needs_last
        if shared := self.prefixes.longest(conversation.target_ids, beyond=keep, limit=limit):
            self.prefixes.copy_into(stream.slot, shared, start=keep)
            conversation.cached_ids = list(shared.ids)

    def _take(self, stream: Stream, positions: list[Position], vectors: Tensor, hidden: Tensor) -> None:
        """hidden [len(positions), D] of the next positions, which the LLM read as `vectors`."""
        conversation, reply = stream.conversation, stream.head
        if not bool(torch.isfinite(hidden).all()):
            raise StreamFailure("the LLM's prefill gave NaN")
        start = len(conversation.cached_ids)
        if self.keeps_rows:
            begin, end = conversation.user_span
            conversation.forget_rows(before=begin)
            for position in range(max(start, begin), min(start + len(positions), end)):
                conversation.kept_rows[position] = hidden[position - start], vectors[position - start]
        conversation.cached_ids += positions
        self.num_positions += len(positions)
        for length in conversation.shared_lengths:
            if start < length <= len(conversation.cached_ids):
                self.prefixes.keep(stream.slot, conversation.target_ids[:length])
        if reply is not None and conversation.is_current() and reply.phase is ReplyPhase.PREFILL:
            if reply.wants_query:
                rows = [conversation.kept_rows[position] for position in range(*conversation.user_span)]
                reply.query_hidden, reply.query_embedding = [h for h, _ in rows], [v for _, v in rows]
                reply.wants_query = False
            reply.hidden = hidden[-1]
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
