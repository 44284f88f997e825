"""The flow: voice tokens become mel frames, chunk by chunk, one Euler step at a time.

    tokens ── embedding ── UpsampleConformerEncoder ── encoder_proj ── mu (the mean)
    x0 = mean_weight * mu + noise_scale * noise ── `n_timesteps` Euler steps of the estimator ── mel

CosyVoice 2 starts from noise alone (mean_weight 0, noise_scale 1, 10 steps, guidance 0.7). A small model starts from
its mean, which was trained first as a regression, with little noise and few steps; 0 steps speak the mean itself. All
of this is data.

`forward` is the offline form. A turn is streamed with a `FlowState`: `push` adds tokens, `step` runs ONE job (encode
a chunk, or one Euler step of it) and returns mel when a chunk is done, so that the engine can put other work between
jobs. Both forms agree, because a chunk sees whole chunks only: its own and `left_context_s` before it (-1: all), and
of a prompt the first `prompt_context_s`, however long ago. Aligned from the prompt's first token. `step_rows` is `step`
for several turns at once, each at its own chunk and its own Euler step, with the left context of all of them in one
`FlowCache` of a bounded window.

Step 9 of the walk. Knows nothing of text, of the vocoder or of calls. Key names are CosyVoice 2's flow.pt.
Source: CosyVoice `flow/flow.py` (CausalMaskedDiffWithXvec) and `flow_matching.py`, as described in facts/minmo.md 2.2;
conditional flow matching: arXiv 2210.02747.

Legend: B rows, N tokens, T mel frames, M mel bins, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from minmo_runtime.model.fixed_shapes import ROW_BUCKETS, bucket
from minmo_runtime.model.flow_cache import FlowCache, GrowingCache, LeftContext, RingRows
from minmo_runtime.model.flow_dims import FlowDims
from minmo_runtime.model.flow_encoder import (
    UpsampleConformerEncoder,
    chunk_mask,
    padding_mask,
)
from minmo_runtime.model.flow_estimator import FlowEstimator
from minmo_runtime.model.flow_state import ChunkInWork, FlowState

_NOISE_FRAMES = 15_000  # 300 s at 50 Hz, as in CosyVoice 2; longer turns read the table again from its start


@functools.lru_cache(maxsize=2)
def _noise_table(num_mel_bins: int) -> Tensor:
    """The start noise of every turn, [1, M, 15000]: fixed, so that a chunk's mel does not depend on how tokens
    arrived.
    """
    return torch.randn(1, num_mel_bins, _NOISE_FRAMES, generator=torch.Generator().manual_seed(0))


class Decoder(nn.Module):
    """Only a name level of the checkpoint: `decoder.estimator.*`."""

    def __init__(self, dims: FlowDims) -> None:
        super().__init__()
        self.estimator = FlowEstimator(dims.estimator, dims.num_mel_bins)


class Flow(nn.Module):
    """Weights of one flow; all streaming state is in `FlowState`."""

    def __init__(self, dims: FlowDims) -> None:
        super().__init__()
        self.dims = dims
        self.input_embedding = nn.Embedding(dims.vocab_size, dims.encoder.output_size)
        self.spk_embed_affine_layer = nn.Linear(dims.spk_embed_dim, dims.num_mel_bins)
        self.encoder = UpsampleConformerEncoder(dims.encoder)
        self.encoder_proj = nn.Linear(dims.encoder.output_size, dims.num_mel_bins)
        self.decoder = Decoder(dims)

    # ------------------------------------------------------------------ shared pieces

    def speaker(self, embedding: Tensor) -> Tensor:
        """Speaker vector [B, spk_embed_dim] → [B, M]."""
        return self.spk_embed_affine_layer(nn.functional.normalize(embedding, dim=1))

    def time_points(self) -> list[float]:
        points = torch.linspace(0, 1, self.dims.n_timesteps + 1)
        if self.dims.t_scheduler == "cosine":
            points = 1 - torch.cos(points * 0.5 * math.pi)
        return points.tolist()

    def start(self, mu: Tensor, first_frames: Sequence[int]) -> Tensor:
        """x0 of the frames from first_frames[b] on; mu [B, M, T]."""
        first = torch.tensor(first_frames)[:, None]
        index = (first + torch.arange(mu.shape[-1])).remainder(_NOISE_FRAMES)  # [B, T]
        noise = _noise_table(self.dims.num_mel_bins)[0][:, index].transpose(0, 1).to(mu)
        return self.dims.mean_weight * mu + self.dims.noise_scale * noise

    def mean(
        self,
        tokens: Tensor,
        lengths: Tensor,
        context: Tensor | None = None,
        is_streaming: bool = True,
        num_pinned: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """tokens [B, N], look-ahead tokens `context` [B, <= 3] → mu [B, M, 2N] and its padding mask [B, 2N]."""
        embedded = self.input_embedding(tokens) * padding_mask(lengths, tokens.shape[1])[..., None]
        ahead = None if context is None else self.input_embedding(context)
        left = self.dims.num_left_chunks
        hidden, valid = self.encoder(embedded, lengths, ahead, is_streaming, left + num_pinned if left >= 0 else -1)
        return self.encoder_proj(hidden).transpose(1, 2), valid

    def direction(
        self,
        x: Tensor,
        mu: Tensor,
        time: Tensor,
        speaker: Tensor,
        condition: Tensor,
        attention: Tensor | None = None,
        cache: LeftContext | None = None,
    ) -> Tensor:
        """One estimator call at inference, time [B]; guided (the same rows again without conditions behind them) if
        `inference_cfg_rate` > 0.
        """
        dims, rows = self.dims, x.shape[0]
        rate = dims.inference_cfg_rate
        if rate > 0:
            x, time = torch.cat((x, x)), torch.cat((time, time))
            mu, speaker, condition = (torch.cat((part, torch.zeros_like(part))) for part in (mu, speaker, condition))
            if attention is not None and attention.dim() == 3:
                attention = torch.cat((attention, attention))
        left = dims.num_left_chunks
        keep = left * dims.chunk_size * dims.frames_per_token if left >= 0 else -1
        v = self.decoder.estimator(x, mu, time, speaker, condition, None, attention, keep, cache)
        return (1 + rate) * v[:rows] - rate * v[rows:] if rate > 0 else v

    # ------------------------------------------------------------------ offline

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        embedding: Tensor,
        prompt_tokens: Tensor | None = None,
        prompt_mel: Tensor | None = None,
        is_streaming: bool = True,
        is_final: bool = True,
    ) -> Tensor:
        """tokens [1, N], embedding [1, spk_embed_dim], prompt_mel [1, M, Tp] → mel [1, M, T] without the prompt.

        `is_streaming` uses the chunk masks (equal to the streamed turn); not `is_final`: the last tokens are
        look-ahead only.
        """
        dims, pinned = self.dims, 0
        if prompt_tokens is not None:
            pinned = dims.pinned_chunks(prompt_tokens.shape[1])
            tokens = torch.cat((prompt_tokens, tokens), dim=1)
        context = None
        if not is_final:
            ahead = dims.encoder.pre_lookahead_len
            tokens, context = tokens[:, :-ahead], tokens[:, -ahead:]
        lengths = torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device)
        mu, _ = self.mean(tokens, lengths, context, is_streaming, pinned)
        if dims.n_timesteps == 0:
            return mu[..., 0 if prompt_mel is None else prompt_mel.shape[-1] :]
        condition = torch.zeros_like(mu)
        if prompt_mel is not None:
            condition[..., : prompt_mel.shape[-1]] = prompt_mel
        attention = None
        if is_streaming:
            frames = dims.chunk_size * dims.frames_per_token
            attention = chunk_mask(mu.shape[-1], frames, dims.num_left_chunks, mu.device, pinned)
        speaker, x, points = self.speaker(embedding), self.start(mu, [0] * len(mu)), self.time_points()
        for now, then in zip(points, points[1:], strict=False):
            time = torch.full((len(x),), now, device=x.device)
            x = x + (then - now) * self.direction(x, mu, time, speaker, condition, attention)
        return x[..., 0 if prompt_mel is None else prompt_mel.shape[-1] :]

    # ------------------------------------------------------------------ streaming

    @torch.inference_mode()
    def new_state(
        self,
        embedding: Tensor,
        prompt_tokens: list[int] | None = None,
        prompt_mel: Tensor | None = None,
        slot: int = -1,
    ) -> FlowState:
        """A turn with the voice `embedding` [1, spk_embed_dim]; the prompt is encoded with the first tokens. With a
        `slot` its left context is in a FlowCache, and it goes through `step_rows` only."""
        skip = 0 if prompt_mel is None else prompt_mel.shape[-1]
        pinned = self.dims.pinned_chunks(len(prompt_tokens or ()))
        frames = pinned * self.dims.chunk_size * self.dims.frames_per_token
        caches = [GrowingCache(frames) for _ in range(self.dims.n_timesteps)] if slot < 0 else []
        return FlowState(
            self.speaker(embedding),
            prompt_mel,
            list(prompt_tokens or ()),
            frames_to_skip=skip,
            num_pinned=pinned,
            slot=slot,
            estimator_caches=caches,
        )

    def push(self, state: FlowState, tokens: list[int], is_final: bool = False) -> None:
        """Add voice tokens; `is_final` says that no more will come in this turn."""
        state.tokens += tokens
        state.is_final = state.is_final or is_final

    def can_step(self, state: FlowState) -> bool:
        """Whether `step` has a job."""
        if state.chunk is not None:
            return True
        wanted = self.dims.chunk_size + self.dims.encoder.pre_lookahead_len
        return len(state.tokens) >= wanted or bool(state.is_final and state.tokens)

    @torch.inference_mode()
    def step(self, state: FlowState) -> Tensor | None:
        """Run one job; returns mel [1, M, T] when it finished a chunk (T may be 0 inside a prompt), else None."""
        if state.chunk is None:
            if not self.can_step(state):
                return None
            dims = self.dims
            size = min(dims.chunk_size, len(state.tokens))
            tokens = torch.tensor([state.tokens[: size + dims.encoder.pre_lookahead_len]], device=self._device)
            embedded = self.input_embedding(tokens)
            left = dims.num_left_chunks
            keep = (left + state.num_pinned) * dims.chunk_size if left >= 0 else -1
            hidden = self.encoder.step(embedded[:, :size], embedded[:, size:], state.encoder_cache, keep)
            self._begin_chunk(state, self.encoder_proj(hidden).transpose(1, 2), size)
        else:
            index = state.chunk.num_steps_done
            self._euler([state], [state.chunk], None, state.estimator_caches[index])
        return self._finished(state)

    # ------------------------------------------------------- streaming, many turns

    def new_cache(self, num_slots: int, window_chunks: int, num_prompt_tokens: int = 0) -> FlowCache:
        """`num_prompt_tokens`: of the longest prompt, whose chunks stay in reach."""
        return FlowCache(num_slots, window_chunks, self.dims.pinned_chunks(num_prompt_tokens))

    @torch.inference_mode()
    def step_rows(self, states: Sequence[FlowState], cache: FlowCache) -> list[Tensor | None]:
        """One job for turns that all stand before a chunk, or all inside one (at any Euler step). What each gives is
        what `step` would give. A pass that raises has changed nothing and can be run again, with fewer rows."""
        if states[0].chunk is None:
            self._encode_rows(states, cache)
        else:
            chunks = [state.chunk for state in states if state.chunk is not None]
            assert len(chunks) == len(states), "rows before and inside a chunk in one job"
            self._euler_rows(states, chunks, cache)
        return [self._finished(state) for state in states]

    def _encode_rows(self, states: Sequence[FlowState], cache: FlowCache) -> None:
        dims, width = self.dims, self.dims.chunk_size
        total = width + dims.encoder.pre_lookahead_len
        padded = [(state.tokens[:total] + [0] * total)[:total] for state in states]
        sizes = [min(width, len(state.tokens)) for state in states]
        num_real = torch.tensor([min(total, len(state.tokens)) for state in states], device=self._device)
        real = padding_mask(num_real, total)
        chunks = [state.num_chunks for state in states]
        pinned = [state.num_pinned for state in states]
        view = cache.view([state.slot for state in states], cache.num_slots, chunks, pinned, self._device)
        stride = dims.frames_per_token
        masks = (view.visible(width, sizes), view.visible(width * stride, [size * stride for size in sizes]))
        embedded = self.input_embedding(torch.tensor(padded, device=self._device))
        hidden = self.encoder.step_rows(embedded, real, width, view, masks)
        mu = self.encoder_proj(hidden).transpose(1, 2)
        for row, (state, size) in enumerate(zip(states, sizes, strict=True)):
            self._begin_chunk(state, mu[row : row + 1], size)

    def _euler_rows(self, states: Sequence[FlowState], chunks: Sequence[ChunkInWork], cache: FlowCache) -> None:
        """In fixed shapes the batch is filled up by rows like the first one, which write into the spare slot."""
        num_spare = 0 if cache.fixed is None else bucket(len(states), ROW_BUCKETS) - len(states)
        filled = [*zip(states, chunks, strict=True)] + [(states[0], chunks[0])] * num_spare
        slots = [state.slot for state in states] + [cache.num_slots - 1] * num_spare
        rows = [chunk.num_steps_done * cache.num_slots + slot for slot, (_, chunk) in zip(slots, filled, strict=True)]
        numbers, pinned = [state.num_chunks for state, _ in filled], [state.num_pinned for state, _ in filled]
        num_rows = self.dims.n_timesteps * cache.num_slots
        lengths = [chunk.num_frames for _, chunk in filled]
        if self.dims.inference_cfg_rate > 0:
            rows, numbers, pinned = rows + [row + num_rows for row in rows], numbers * 2, pinned * 2
            lengths, num_rows = lengths * 2, num_rows * 2
        view = cache.ring_view(rows, num_rows, numbers, pinned, self._device)
        visible = view.visible(chunks[0].x.shape[-1], lengths)
        if visible is not None:
            visible = visible[: len(filled)]  # `direction` doubles it
        self._euler([state for state, _ in filled], [chunk for _, chunk in filled], visible, view, len(states))

    def _fixed_direction(self, view: RingRows) -> Callable[..., Tensor]:
        """`direction` as a function of nothing but tensors, which a CUDA graph can read again."""
        cache, num_rows, num_seen = view.cache, view.num_rows, view.num_seen

        def run(
            x: Tensor, mu: Tensor, time: Tensor, speaker: Tensor, condition: Tensor, visible: Tensor, *where: Tensor
        ) -> Tensor:
            index, place, now, is_first = where
            again = RingRows(cache, num_rows, index, place, now, is_first, num_seen)
            return self.direction(x, mu, time, speaker, condition, visible, again)

        return run

    # ------------------------------------------------------------- shared pieces

    @property
    def _device(self) -> torch.device:
        return self.encoder_proj.weight.device

    def _begin_chunk(self, state: FlowState, mu: Tensor, size: int) -> None:
        """The chunk's `size` tokens are encoded: mu [1, M, T]."""
        del state.tokens[:size]
        begin, num_frames = state.frames_done, size * self.dims.frames_per_token
        state.frames_done += num_frames
        if self.dims.n_timesteps == 0:
            state.chunk = ChunkInWork(mu, mu, mu, num_frames=num_frames)
            return
        condition = torch.zeros_like(mu)
        if state.prompt_mel is not None:
            piece = state.prompt_mel[..., begin : state.frames_done]
            condition[..., : piece.shape[-1]] = piece
        # The sum over Euler steps stays in float32, whatever the weights are in.
        state.chunk = ChunkInWork(mu, self.start(mu.float(), [begin]), condition, num_frames=num_frames)

    def _euler(
        self,
        states: Sequence[FlowState],
        chunks: Sequence[ChunkInWork],
        visible: Tensor | None,
        cache: LeftContext,
        num_real: int | None = None,
    ) -> None:
        """One Euler step of each chunk, each at its own time; rows behind the first `num_real` only fill up."""
        points = self.time_points()
        now = torch.tensor([points[chunk.num_steps_done] for chunk in chunks], device=self._device)
        then = torch.tensor([points[chunk.num_steps_done + 1] for chunk in chunks], device=self._device)
        x, mu, condition = (torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("x", "mu", "condition"))
        speaker = torch.cat([state.speaker for state in states])
        inputs = (x.to(mu.dtype), mu, now, speaker, condition)
        if isinstance(cache, RingRows) and cache.cache.fixed is not None:
            where = (cache.index, cache.place, cache.now, cache.is_first)
            key = ("euler", *mu.shape)
            v = cache.cache.fixed(key, self._fixed_direction(cache), [*inputs, visible, *where])
        else:
            v = self.direction(*inputs, visible, cache)
        x = x + (then - now)[:, None, None] * v.float()
        for row, chunk in enumerate(chunks[:num_real]):
            chunk.x = x[row : row + 1]
            chunk.num_steps_done += 1

    def _finished(self, state: FlowState) -> Tensor | None:
        """The mel of a chunk that has made its last step, without the prompt's frames."""
        chunk = state.chunk
        if chunk is None or chunk.num_steps_done < self.dims.n_timesteps:
            return None
        mel, state.chunk = chunk.x[..., : chunk.num_frames], None
        state.num_chunks += 1
        skip = min(state.frames_to_skip, mel.shape[-1])
        state.frames_to_skip -= skip
        return mel[..., skip:]

    # ------------------------------------------------------------------ training

    def matching_loss(
        self,
        clean: Tensor,
        mu: Tensor,
        valid: Tensor,
        speaker: Tensor,
        condition: Tensor,
        time: Tensor,
        noise: Tensor,
        keeps_conditions: Tensor | None = None,
        is_streaming: bool = True,
    ) -> Tensor:
        """Flow-matching loss. clean, mu, condition, noise [B, M, T]; valid [B, T]; time [B] uniform in [0, 1].

        `keeps_conditions` [B]: false drops mu, speaker and condition of that row (training for guidance).
        """
        dims = self.dims
        start = dims.mean_weight * mu + dims.noise_scale * noise
        remain = 1 - dims.sigma_min
        at = time[:, None, None]
        x = (1 - remain * at) * start + at * clean
        target = clean - remain * start
        if keeps_conditions is not None:
            keep = keeps_conditions.to(mu)[:, None]
            mu, condition, speaker = mu * keep[..., None], condition * keep[..., None], speaker * keep
        attention = None
        if is_streaming:
            frames = dims.chunk_size * dims.frames_per_token
            attention = chunk_mask(clean.shape[-1], frames, dims.num_left_chunks, clean.device)
        made = self.decoder.estimator(x, mu, time, speaker, condition, valid, attention)
        weight = valid[:, None].to(clean)
        return (((made - target) * weight).square().sum()) / (weight.sum() * clean.shape[1])
