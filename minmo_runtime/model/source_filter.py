"""Vocoder of kind "source_filter": a harmonic pulse train and noise, shaped frame by frame, then an inverse STFT.

    mel ──┬─ F0 predictor ── pulse train ── STFT ──×── harmonic filter ──┐
          │                      noise ──── STFT ──×── noise filter ─────┴─ + ── inverse STFT, overlap-add ── waveform
          └─ ConvNeXt blocks (one per mel frame) ── the two filters, `hops_per_frame` of them per mel frame

The idea is HiFT's (source + filter + iSTFT), the network runs at 50 Hz only, so two CPU cores can train and serve it.
Streaming and offline are one code path: every convolution is causal over an explicit cache, and the look-ahead stands
in the first layers only. `push` of any split of a mel gives the same samples. All state lives in `SourceFilterState`,
one per turn.

Step 9 of the walk. Knows nothing of tokens, flow or calls.
Source: neural source-filter (arXiv 1904.12088), Vocos (arXiv 2306.00814), HiFT-Net (arXiv 2309.09493); sizes: our
choice.

Legend: B rows, T mel frames, M mel bins, D width, S samples, H hops per mel frame, K = frequency bins.
Look-ahead, with defaults, in mel frames: filter network 2, overlap-add 0.75 on top: 2.75 in all. The source needs the
F0 of frame n+1 for the filters of frame n, and the F0 predictor one mel frame more: the same 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minmo_runtime.model.dims import Dims


@dataclass(frozen=True)
class SourceFilterDims(Dims):
    """Table `[vocoder]` of a checkpoint whose kind is "source_filter"."""

    num_mel_bins: int = 80
    sample_rate_hz: int = 24_000
    samples_per_frame: int = 480
    hops_per_frame: int = 2
    num_fft_samples: int = 960
    width: int = 160
    num_blocks: int = 6
    expansion: int = 3
    kernel_size: int = 7
    look_ahead_frames: int = 2
    f0_width: int = 128
    f0_min_hz: float = 70.0
    f0_max_hz: float = 420.0
    mel_mean: float = -5.0  # fixed, so that the network sees about zero mean and unit variance
    mel_std: float = 3.0

    @property
    def hop_samples(self) -> int:
        return self.samples_per_frame // self.hops_per_frame

    @property
    def num_bins(self) -> int:
        return self.num_fft_samples // 2 + 1

    @property
    def overlap_samples(self) -> int:
        """How far a filter's window reaches before and after its own hop: (window - hop) / 2."""
        return (self.num_fft_samples - self.hop_samples) // 2


@dataclass
class SourceFilterState:
    """One turn of one call (or B rows in step, in training). Owner: the caller of `push`, who passes it along."""

    caches: dict[str, Tensor] = field(default_factory=dict)  # left context of each convolution
    frames_in: int = 0  # mel frames pushed
    pending: Tensor | None = None  # filters of frames whose source is not complete yet  [B, t, 3HK]
    f0_last_hz: Tensor | None = None  # F0 at the end of the last frame with a source; 0 = unvoiced  [B]
    phase_cycles: Tensor | None = None  # pulse phase there  [B], float64
    source: Tensor | None = None  # pulse train not yet consumed  [B, S]
    source_start: int = 0  # sample index of source[:, 0]
    filtered_frames: int = 0  # mel frames already filtered
    overlap: Tensor | None = None  # overlap-add tail  [B, S]
    samples_out: int = 0
    last_mel: Tensor | None = None  # [B, M, 1]


class CausalConv(nn.Conv1d):
    """Convolution over time whose left context comes from the state instead of padding; zeros at the start."""

    def step(self, x: Tensor, caches: dict[str, Tensor], name: str, left: int | None = None) -> Tensor:
        """`left` < kernel - 1 lets the kernel look kernel - 1 - left frames ahead; that many outputs come later."""
        reach = self.kernel_size[0] - 1
        cache = caches.get(name)
        if cache is None:
            cache = x.new_zeros(x.shape[0], x.shape[1], reach if left is None else left)
        x = torch.cat((cache, x), dim=-1)
        caches[name] = x[..., max(0, x.shape[-1] - reach) :]
        if x.shape[-1] <= reach:
            return x.new_zeros(x.shape[0], self.out_channels, 0)
        return self(x)


class ConvNeXtBlock(nn.Module):
    """Depth-wise causal convolution, LayerNorm, two point-wise layers, residual (arXiv 2201.03545)."""

    def __init__(self, dims: SourceFilterDims) -> None:
        super().__init__()
        self.dwconv = CausalConv(dims.width, dims.width, dims.kernel_size, groups=dims.width)
        self.norm = nn.LayerNorm(dims.width)
        self.pwconv1 = nn.Linear(dims.width, dims.expansion * dims.width)
        self.pwconv2 = nn.Linear(dims.expansion * dims.width, dims.width)
        self.gamma = nn.Parameter(torch.full((dims.width,), 1.0 / dims.num_blocks))

    def step(self, x: Tensor, caches: dict[str, Tensor], name: str) -> Tensor:
        y = self.dwconv.step(x, caches, name).transpose(1, 2)  # [B, T, D]
        y = self.pwconv2(nn.functional.gelu(self.pwconv1(self.norm(y))))
        return x + (self.gamma * y).transpose(1, 2)


class F0Predictor(nn.Module):
    """mel → (log2 of F0 over `f0_min_hz`, voicing logit) at the END of each mel frame; looks one frame ahead."""

    def __init__(self, dims: SourceFilterDims) -> None:
        super().__init__()
        self.dims = dims
        self.conv_in = CausalConv(dims.num_mel_bins, dims.f0_width, 3)
        self.convs = nn.ModuleList(CausalConv(dims.f0_width, dims.f0_width, 5) for _ in range(2))
        self.classifier = nn.Conv1d(dims.f0_width, 2, 1)

    def step(self, mel: Tensor, caches: dict[str, Tensor]) -> Tensor:
        x = nn.functional.elu(self.conv_in.step(mel, caches, "f0_in", left=1))
        for index, conv in enumerate(self.convs):
            x = nn.functional.elu(conv.step(x, caches, f"f0_{index}"))
        return self.classifier(x) if x.shape[-1] else x[:, :2]  # [B, 2, T]

    def to_hz(self, prediction: Tensor) -> Tensor:
        """[B, 2, T] → F0 in Hz [B, T], 0 where unvoiced."""
        f0_hz = self.dims.f0_min_hz * torch.exp2(prediction[:, 0])
        return torch.where(prediction[:, 1] > 0, f0_hz.clamp(self.dims.f0_min_hz, self.dims.f0_max_hz), 0.0)


def pulse_train(f0_hz: Tensor, previous_hz: Tensor, phase: Tensor, dims: SourceFilterDims) -> tuple[Tensor, Tensor]:
    """Band-limited pulses of RMS 1 for frames whose END F0 is given; F0 runs linearly inside a frame.

    f0_hz [B, T] (0 = unvoiced), previous_hz [B] = F0 at the start of the first frame, phase [B] in cycles (float64).
    Returns samples [B, T * samples_per_frame] and the phase at the end.
    A frame with one unvoiced end keeps the F0 of the voiced end and fades its amplitude, so the pitch never glides to
    0.

    Example: 100 Hz at both ends, 480 samples at 24 kHz: 480 * 100 / 24000 = 2 cycles, two pulses in the frame.
    """
    n, rate = dims.samples_per_frame, dims.sample_rate_hz
    end = f0_hz
    start = torch.cat((previous_hz[:, None], f0_hz[:, :-1]), dim=1)
    ramp = torch.arange(1, n + 1, device=f0_hz.device, dtype=torch.float32)
    gate = (start > 0).float()[..., None] + ((end > 0).float() - (start > 0).float())[..., None] * (ramp / n)
    low, high = torch.where(start > 0, start, end).double(), torch.where(end > 0, end, start).double()
    # Sum of the linear F0 over the first k samples: low*k + (high-low)*k*(k+1)/(2n).
    steps = ramp.double()
    cycles = (low[..., None] * steps + ((high - low) / (2 * n))[..., None] * (steps * (steps + 1))) / rate  # [B, T, n]
    ends = phase[:, None] + cycles[..., -1].cumsum(dim=1)
    begin = torch.cat((phase[:, None], ends[:, :-1]), dim=1)
    angle = torch.remainder(begin[..., None] + cycles + 0.5, 1.0) - 0.5  # in [-0.5, 0.5): precise near the pulse
    angle = angle.float() * math.pi
    harmonics = torch.floor(0.46 * rate / torch.maximum(start, end).clamp_min(1.0))[..., None].clamp_max(400.0)
    sine = torch.sin(angle)
    is_peak = sine.abs() < 1e-5
    kernel = 0.5 * (torch.sin((2 * harmonics + 1) * angle) / torch.where(is_peak, 1.0, sine) - 1.0)
    pulses = torch.where(is_peak, harmonics, kernel) * torch.sqrt(2.0 / harmonics) * gate
    return pulses.flatten(1), torch.remainder(ends[:, -1], 1.0)


class SourceFilterVocoder(nn.Module):
    """mel [B, M, T] → waveform [B, T * samples_per_frame]."""

    def __init__(self, dims: SourceFilterDims) -> None:
        super().__init__()
        self.dims = dims
        self.f0_predictor = F0Predictor(dims)
        self.conv_in = CausalConv(dims.num_mel_bins, dims.width, dims.kernel_size)
        self.blocks = nn.ModuleList(ConvNeXtBlock(dims) for _ in range(dims.num_blocks))
        self.norm_out = nn.LayerNorm(dims.width)
        self.filters = nn.Linear(dims.width, 3 * dims.hops_per_frame * dims.num_bins)
        nn.init.normal_(self.filters.weight, std=0.01)
        nn.init.zeros_(self.filters.bias)
        self.register_buffer("window", torch.hann_window(dims.num_fft_samples), persistent=False)
        # The noise is a fixed table read by sample index, so that it does not depend on how the mel was cut.
        table = torch.randn(1 << 17, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", table, persistent=False)

    def new_state(self) -> SourceFilterState:
        return SourceFilterState()

    def forward(self, mel: Tensor, f0_hz: Tensor | None = None) -> Tensor:
        """Offline form. `f0_hz` [B, T] replaces the predictor (training)."""
        return self.push(mel, self.new_state(), is_final=True, f0_hz=f0_hz)

    def push(
        self, mel: Tensor, state: SourceFilterState, is_final: bool = False, f0_hz: Tensor | None = None
    ) -> Tensor:
        """Feed T >= 0 mel frames [B, M, T]; returns the samples that became final [B, S]. S may be 0.

        After `is_final` the total is exactly (frames pushed) * samples_per_frame. `f0_hz` [B, T] only with one final
        push.
        """
        dims = self.dims
        if mel.shape[-1]:
            state.last_mel = mel[..., -1:]
        state.frames_in += mel.shape[-1]
        if state.last_mel is None:
            return mel.new_zeros(mel.shape[0], 0)
        if is_final:  # the look-ahead past the end repeats the last frame
            mel = torch.cat((mel, state.last_mel.expand(-1, -1, dims.look_ahead_frames)), dim=-1)
        x = (mel - dims.mel_mean) / dims.mel_std
        if f0_hz is None:
            f0_hz = self.f0_predictor.to_hz(self.f0_predictor.step(x, state.caches))
        self._extend_source(f0_hz, state, is_final)
        x = self.conv_in.step(x, state.caches, "in", left=dims.kernel_size - 1 - dims.look_ahead_frames)
        for index, block in enumerate(self.blocks):
            if x.shape[-1] == 0:
                break
            x = block.step(x, state.caches, f"block_{index}")
        filters = self.filters(self.norm_out(x.transpose(1, 2)))  # [B, t, 3HK]
        state.pending = filters if state.pending is None else torch.cat((state.pending, filters), dim=1)
        return self._emit(state, is_final)

    def _extend_source(self, f0_hz: Tensor, state: SourceFilterState, is_final: bool) -> None:
        dims = self.dims
        if state.source is None:
            state.source = f0_hz.new_zeros(f0_hz.shape[0], dims.overlap_samples)  # before the first sample: silence
            state.source_start = -dims.overlap_samples
            state.f0_last_hz = f0_hz.new_zeros(f0_hz.shape[0])
            state.phase_cycles = torch.zeros(f0_hz.shape[0], dtype=torch.float64, device=f0_hz.device)
        if f0_hz.shape[1]:
            assert state.f0_last_hz is not None and state.phase_cycles is not None
            pulses, state.phase_cycles = pulse_train(f0_hz, state.f0_last_hz, state.phase_cycles, dims)
            state.f0_last_hz = f0_hz[:, -1]
            state.source = torch.cat((state.source, pulses), dim=1)
        if is_final:  # past the last F0: silence, at least as long as the last window
            state.source = nn.functional.pad(state.source, (0, dims.num_fft_samples))

    def _emit(self, state: SourceFilterState, is_final: bool) -> Tensor:
        """Filter every frame whose filters and source are complete; hand out what no later frame touches."""
        dims = self.dims
        assert state.pending is not None and state.source is not None
        n, hop, reach = dims.samples_per_frame, dims.hop_samples, dims.overlap_samples
        source_end = state.source_start + state.source.shape[1]
        # The last window of frame f ends at (f + 1) * n + reach; so the frames complete so far:
        ready = min(state.pending.shape[1], (source_end - reach) // n - state.filtered_frames)
        if ready > 0:
            windows = self._filter_windows(state.pending[:, :ready], state)  # [B, H*ready, fft]
            state.pending = state.pending[:, ready:]
            state.overlap = _overlap_add(windows, hop, state.overlap)
            state.filtered_frames += ready
            keep_from = state.filtered_frames * n - reach
            state.source = state.source[:, keep_from - state.source_start :]
            state.source_start = keep_from
        if state.overlap is None:
            return state.source.new_zeros(state.source.shape[0], 0)
        # overlap[:, 0] is sample `samples_out - lead`; the first window starts `reach` samples before sample 0.
        lead = reach if state.samples_out == 0 else 0
        final_until = state.frames_in * n if is_final else state.filtered_frames * n - reach
        count = max(0, final_until - state.samples_out)
        samples = state.overlap[:, lead : lead + count]
        if count:
            state.overlap = state.overlap[:, lead + count :]
            state.samples_out += count
        return samples

    def _filter_windows(self, filters: Tensor, state: SourceFilterState) -> Tensor:
        dims = self.dims
        assert state.source is not None
        rows, num_frames = filters.shape[:2]
        num_hops, hop, size = num_frames * dims.hops_per_frame, dims.hop_samples, dims.num_fft_samples
        length = (num_hops - 1) * hop + size
        start = state.filtered_frames * dims.samples_per_frame - dims.overlap_samples
        offset = start - state.source_start
        harmonic = state.source[:, offset : offset + length].unfold(1, size, hop)  # [B, hops, fft]
        index = torch.arange(start, start + length, device=filters.device).remainder(self.noise.shape[0])
        noise = self.noise[index].unfold(0, size, hop)  # the same for each row  [hops, fft]
        harmonic_spectrum = torch.fft.rfft(harmonic * self.window)
        noise_spectrum = torch.fft.rfft(noise * self.window)
        gain, angle, noise_gain = filters.view(rows, num_hops, 3, dims.num_bins).unbind(dim=2)
        # exp(-4): the loudness of speech against a source of RMS 1, so that training starts at a sensible level.
        complex_gain = torch.polar(torch.exp(gain.clamp(max=8.0) - 4.0), angle)
        spectrum = harmonic_spectrum * complex_gain + noise_spectrum * torch.exp(noise_gain.clamp(max=8.0) - 4.0)
        # Hann squared at this overlap sums to 3/8 * fft / hop: divide by it.
        return torch.fft.irfft(spectrum, n=size) * (self.window * (hop / (0.375 * size)))


def _overlap_add(windows: Tensor, hop: int, tail: Tensor | None) -> Tensor:
    """windows [B, N, size] at distance `hop`, added onto `tail`, whose sample 0 is the first sample not handed out yet.

    The first window starts (size - hop) samples before the end of the tail; without a tail it starts the sum.
    """
    rows, num_windows, size = windows.shape
    length = (num_windows - 1) * hop + size
    summed = nn.functional.fold(
        windows.transpose(1, 2), output_size=(1, length), kernel_size=(1, size), stride=(1, hop)
    ).view(rows, length)
    if tail is None:
        return summed
    shared = size - hop
    assert tail.shape[1] >= shared, (tail.shape, shared)
    joined = tail[:, tail.shape[1] - shared :] + summed[:, :shared]
    return torch.cat((tail[:, : tail.shape[1] - shared], joined, summed[:, shared:]), dim=1)
