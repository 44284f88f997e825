"""The voice token LM of the figure: semantic vectors in, voice tokens out, under CosyVoice 2's key names (`llm.pt`).

A Qwen2 trunk with a table of voice tokens in front and a head behind it. It always consumes *semantic vectors*: those
of the output projector, or (the parent's way, and our bridge) rows of its own text table. Which row comes next is
decided by
`interleave.VoiceTurn`, which id is drawn by `sampling`; this file owns the numbers and one step for several calls at
once.
Walk: step 9. Sources: MinMo (arXiv 2501.06282 §3.2), CosyVoice 2 (arXiv 2412.10117 §2.3), keys as in its released
checkpoint.

Legend: B calls, T rows, N semantic vectors of one call, Q query vectors, D hidden_size, S speech_token_size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minmo_runtime.model.backbone import Backbone, KvCache
from minmo_runtime.model.dims import BackboneDims, Dims
from minmo_runtime.model.interleave import InterleaveRules, Row, RowKind, VoiceTurn
from minmo_runtime.sampling import Draw, SamplingRules, draw_with, ras_sample

# [n, D] and the slots of n rows → hidden [n, D]: minmo_runtime/decode_step.py
OneRow = Callable[[Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True)
class VoiceLmDims(Dims):
    """Trunk sizes under Qwen2's names, the number of voice tokens, the text table's size, and how service draws.

    The `sampling_` values are CosyVoice 2's by default (see sampling.SamplingRules); a checkpoint with little
    repetition to fear is served with temperature 0. `max_voice_per_text` ends a turn that does not end itself.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    speech_token_size: int
    text_vocab_size: int
    head_dim: int = 0
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    num_text: int = 5  # block of the interleaved order: text rows, then voice tokens
    num_voice: int = 15
    sampling_temperature: float = 1.0
    sampling_top_p: float = 0.8
    sampling_top_k: int = 25
    sampling_window: int = 10
    sampling_max_repeats_share: float = 0.1
    min_voice_per_text: float = 0.0
    max_voice_per_text: float = 20.0

    def trunk(self) -> BackboneDims:
        return BackboneDims(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            vocab_size=self.text_vocab_size,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            rms_norm_eps=self.rms_norm_eps,
        )

    def rules(self, interleaved: bool = True, **changes: Any) -> InterleaveRules:
        """The order of rows for this checkpoint."""
        rules = InterleaveRules(
            self.speech_token_size,
            num_text=self.num_text,
            num_voice=self.num_voice,
            interleaved=interleaved,
            min_voice_per_text=self.min_voice_per_text,
            max_voice_per_text=self.max_voice_per_text,
        )
        return dataclasses.replace(rules, **changes)

    def sampling(self) -> SamplingRules:
        """How service draws voice tokens."""
        return SamplingRules(
            top_p=self.sampling_top_p,
            top_k=self.sampling_top_k,
            window=self.sampling_window,
            max_repeats_share=self.sampling_max_repeats_share,
            temperature=self.sampling_temperature,
        )


class _Qwen2Encoder(nn.Module):
    """Only there for the parent's key prefix `llm.model.`."""

    def __init__(self, dims: BackboneDims) -> None:
        super().__init__()
        self.model = Backbone(dims)


@dataclass
class VoiceStream:
    """One call's reply inside the voice LM: its order of rows, its vectors so far, its own dice. Owned by the
    engine's decode job.
    """

    turn: VoiceTurn
    slot: int  # of the KvCache; the owner resets it when the stream ends
    draw: Draw
    sampling: SamplingRules = field(default_factory=SamplingRules)
    query: Tensor | None = None  # [Q, D]
    semantic: list[Tensor] = field(default_factory=list)  # each [D]
    is_failed: bool = False  # the row gave NaN; the turn is over

    def push(self, vectors: Tensor) -> None:
        """More semantic vectors [n, D] of the reply."""
        self.semantic += list(vectors)
        self.turn.push_text(len(vectors))

    def finish(self) -> None:
        """The reply's text is complete."""
        self.turn.finish_text()


class VoiceLm(nn.Module):
    """CosyVoice 2's `Qwen2LM`. `llm_embedding` row 0 = start, row 1 = turn of speech; ids S, S+1, S+2 = end, unused,
    fill.
    """

    def __init__(self, dims: VoiceLmDims) -> None:
        super().__init__()
        self.dims = dims
        self.llm = _Qwen2Encoder(dims.trunk())
        self.llm_embedding = nn.Embedding(2, dims.hidden_size)
        self.speech_embedding = nn.Embedding(dims.speech_token_size + 3, dims.hidden_size)
        self.llm_decoder = nn.Linear(dims.hidden_size, dims.speech_token_size + 3)
        # Released checkpoints carry the tied text head a second time; it is never used.
        self.register_load_state_dict_pre_hook(_drop_text_head)

    @property
    def trunk(self) -> Backbone:
        return self.llm.model

    def text_vectors(self, ids: Tensor) -> Tensor:
        """Semantic vectors of the parent's way: rows of the own text table, [..., D]."""
        return self.trunk.embed(ids)

    def new_cache(self, num_slots: int, max_length: int) -> KvCache:
        return self.trunk.new_cache(num_slots, max_length)

    def new_stream(
        self,
        slot: int,
        seed: int,
        rules: InterleaveRules,
        sampling: SamplingRules,
        query: Tensor | None = None,
        prompt_voice: Sequence[int] = (),
        num_prompt_text: int = 0,
    ) -> VoiceStream:
        """Start one reply; `query` [Q, D] are the semantic vectors of the caller's turn. `prompt_voice`: voice tokens
        that the reply continues, and how many of the vectors pushed first are what they say."""
        num_query = 0 if query is None else len(query)
        turn = VoiceTurn(rules, num_query, prompt_voice, num_prompt_text)
        return VoiceStream(turn, slot, draw_with(np.random.default_rng(seed)), sampling, query)

    def embed_rows(self, rows: Sequence[Row], semantic: Sequence[Tensor], query: Tensor | None = None) -> Tensor:
        """[T, D] input vectors of these rows."""
        vectors = []
        for row in rows:
            if row.kind is RowKind.VOICE:
                vectors.append(self.speech_embedding.weight[row.index])
            elif row.kind is RowKind.TEXT:
                vectors.append(semantic[row.index])
            elif row.kind is RowKind.QUERY:
                assert query is not None, "a query row without query vectors"
                vectors.append(query[row.index])
            else:
                vectors.append(self.llm_embedding.weight[0 if row.kind is RowKind.START else 1])
        return torch.stack(vectors)

    def embed_layout(self, kinds: Tensor, indices: Tensor, semantic: Tensor, query: Tensor | None = None) -> Tensor:
        """Padded batch of rows for training: kinds, indices [B, T] (kind < 0 = padding), semantic [B, N, D] -> [B, T,
        D].
        """
        size = self.dims.hidden_size
        is_voice, is_text = kinds == RowKind.VOICE.value, kinds == RowKind.TEXT.value
        x = self.speech_embedding(indices * is_voice) * is_voice[..., None]
        text = semantic.gather(1, (indices * is_text)[..., None].expand(-1, -1, size))
        x = x + text * is_text[..., None]
        if query is not None:
            is_query = kinds == RowKind.QUERY.value
            x = x + query.gather(1, (indices * is_query)[..., None].expand(-1, -1, size)) * is_query[..., None]
        markers = self.llm_embedding.weight
        x = x + markers[0] * (kinds == RowKind.START.value)[..., None]
        return x + markers[1] * (kinds == RowKind.TURN_OF_SPEECH.value)[..., None]

    def forward(self, embeds: Tensor) -> Tensor:
        """Teacher forcing: [B, T, D] -> logits [B, T, S+3]. Padding stands on the right, where causality hides it."""
        return self.llm_decoder(self.trunk(embeds=embeds))

    @torch.no_grad()
    def decode_step(
        self, streams: Sequence[VoiceStream], cache: KvCache, one_row: OneRow | None = None
    ) -> list[int | None]:
        """One step for every stream that has rows to feed; others stall. Returns each stream's new voice token, or
        None. `one_row` takes those that feed a single row (the usual case) in fixed shapes.
        """
        fed = [(index, stream.turn.next_rows()) for index, stream in enumerate(streams)]
        fed = [(index, rows) for index, rows in fed if rows]
        emitted: list[int | None] = [None] * len(streams)
        if not fed:
            return emitted
        try:
            scores = self._scores(streams, fed, cache, one_row)
        except Exception:
            for index, rows in fed:  # so that the step can be tried again with fewer rows
                streams[index].turn.give_back(rows)
            raise
        for row, (index, _) in enumerate(fed):
            stream = streams[index]
            if not np.isfinite(scores[row]).all():
                stream.is_failed = True  # this row only; its neighbours go on
                stream.turn.abandon()
                continue
            token = ras_sample(scores[row], stream.turn.decoded, stream.sampling, stream.draw, stream.turn.banned)
            emitted[index] = stream.turn.accept(token)
        return emitted

    def _scores(
        self,
        streams: Sequence[VoiceStream],
        fed: list[tuple[int, list[Row]]],
        cache: KvCache,
        one_row: OneRow | None,
    ) -> NDArray[np.float32]:
        """[B, S + 3] of each row's last position."""
        last: dict[int, Tensor] = {}
        single = [item for item in fed if len(item[1]) == 1] if one_row is not None else []
        if single and one_row is not None:
            embeds, _ = self._stack(streams, single)
            hidden = one_row(embeds[:, 0], [streams[index].slot for index, _ in single])
            last = {index: hidden[row] for row, (index, _) in enumerate(single)}
        others = [item for item in fed if item[0] not in last]
        if others:
            embeds, num_new = self._stack(streams, others)
            slots = [streams[index].slot for index, _ in others]
            try:
                hidden = self.trunk(embeds=embeds, cache=cache, slots=slots, num_new=num_new)
            except Exception:
                for index in last:  # the step as a whole has not happened
                    cache.lengths[streams[index].slot] -= 1
                raise
            last |= {index: hidden[row, num_new[row] - 1] for row, (index, _) in enumerate(others)}
        return self.llm_decoder(torch.stack([last[index] for index, _ in fed])).float().cpu().numpy()

    def _stack(self, streams: Sequence[VoiceStream], fed: list[tuple[int, list[Row]]]) -> tuple[Tensor, list[int]]:
        """[B, T, D] padded with zeros on the right, and the rows per stream."""
        num_new = [len(rows) for _, rows in fed]
        if max(num_new) == 1 and all(rows[0].kind is RowKind.VOICE for _, rows in fed):
            ids = torch.tensor([rows[0].index for _, rows in fed], device=self.speech_embedding.weight.device)
            return self.speech_embedding(ids)[:, None], num_new
        vectors = [self.embed_rows(rows, streams[index].semantic, streams[index].query) for index, rows in fed]
        return nn.utils.rnn.pad_sequence(vectors, batch_first=True), num_new

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, embedding_std: float = 0.1) -> VoiceLm:
        """Start for training from nothing."""
        self.trunk.init_weights(generator, embedding_std)
        for table in (self.llm_embedding, self.speech_embedding):
            table.weight.normal_(0.0, embedding_std, generator=generator)
        self.llm_decoder.weight.normal_(0.0, 0.5 * self.dims.hidden_size**-0.5, generator=generator)
        self.llm_decoder.bias.zero_()
        return self


def _drop_text_head(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}llm.model.lm_head.weight", None)
