"""Vocoder of kind "hift": CosyVoice 2's HiFT generator. A harmonic source follows the predicted F0, convolutions
shape it, a small inverse STFT writes the waveform.

    mel ─┬─ F0 predictor ── sines of F0 and its harmonics + noise ── STFT ─────────┐ (added at each up-sampling)
         └─ conv_pre ── [leaky ReLU, up-convolution, + source, residual blocks] x 3 ── conv_post ── inverse STFT ──
         waveform

Streaming is the parents': 8 mel frames and their source are repeated in the next call and cross-faded over, so its
pieces are close to, not equal to, the offline wave (the golden vectors of the streamed form say how close). Weight
norm is kept in the parametrised form while loading (`X.parametrizations.weight.original0/1`); the older names and a
`generator.` prefix are accepted.

Step 9 of the walk. Knows nothing of tokens or calls. Source: CosyVoice `hifigan/generator.py` as described in
facts/minmo.md 2.3; HiFTNet (arXiv 2309.09493), Snake (arXiv 2006.08195).

Legend: B rows, T mel frames, M mel bins, C channels, S samples, H harmonics + 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from minmo_runtime.model.dims import Dims
from minmo_runtime.model.fixed_shapes import ROW_BUCKETS, FixedCall, bucket

_MAX_MAGNITUDE = 100.0
_NOISE_SAMPLES = 1 << 17  # of the fixed noise of streamed turns; longer turns read it again


@dataclass(frozen=True)
class HiftDims(Dims):
    """Table `[vocoder]` of a checkpoint whose kind is "hift"; CosyVoice 2's own names. Dilations are one row for every
    block of their kind, or one row per block as the parents write them."""

    in_channels: int = 80
    base_channels: int = 512
    f0_cond_channels: int = 512
    nb_harmonics: int = 8
    sampling_rate: int = 24_000
    nsf_alpha: float = 0.1  # of the sines
    nsf_sigma: float = 0.003  # of the noise under them
    nsf_voiced_threshold: float = 10.0
    upsample_rates: tuple[int, ...] = (8, 5, 3)
    upsample_kernel_sizes: tuple[int, ...] = (16, 11, 7)
    istft_n_fft: int = 16
    istft_hop_len: int = 4
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[int, ...] | tuple[tuple[int, ...], ...] = (1, 3, 5)
    source_resblock_kernel_sizes: tuple[int, ...] = (7, 7, 11)
    source_resblock_dilation_sizes: tuple[int, ...] | tuple[tuple[int, ...], ...] = ()  # (): as the others
    lrelu_slope: float = 0.1  # before each up-sampling; before conv_post it is torch's default 0.01
    audio_limit: float = 0.99
    overlap_frames: int = 8  # carried over and cross-faded between streamed pieces

    @property
    def samples_per_frame(self) -> int:
        return math.prod(self.upsample_rates) * self.istft_hop_len

    def stage_blocks(self) -> list[tuple[int, tuple[int, ...]]]:
        """(kernel, dilations) of the residual blocks of each up-sampling."""
        return _with_dilations(self.resblock_kernel_sizes, self.resblock_dilation_sizes)

    def source_blocks(self) -> list[tuple[int, tuple[int, ...]]]:
        """(kernel, dilations) of the block on the source, one for each up-sampling."""
        dilations = self.source_resblock_dilation_sizes or self.resblock_dilation_sizes
        return _with_dilations(self.source_resblock_kernel_sizes, dilations)


def _with_dilations(
    kernels: tuple[int, ...], dilations: tuple[int, ...] | tuple[tuple[int, ...], ...]
) -> list[tuple[int, tuple[int, ...]]]:
    rows = [row for row in dilations if not isinstance(row, int)]
    if not rows:
        return [(kernel, tuple(dilations)) for kernel in kernels]
    if len(rows) != len(kernels) or len(rows) != len(dilations):
        raise ValueError(f"vocoder: dilations {dilations} must be one row, or one row for each of kernels {kernels}")
    return [(kernel, tuple(row)) for kernel, row in zip(kernels, rows, strict=True)]


@dataclass
class HiftState:
    """One turn of one call: what the next piece repeats. Owner: the caller of `push`."""

    mel: Tensor | None = None  # [B, M, overlap]
    source: Tensor | None = None  # [B, 1, overlap samples]
    tail: Tensor | None = None  # [B, overlap samples], held back for the cross-fade
    start_frame: int = 0  # of `mel`, counted in the turn: where the noise is read

    def take_row(self, whole: HiftState, row: int) -> None:
        """Become row `row` of a stack."""
        for name in ("mel", "source", "tail"):
            part = getattr(whole, name)
            setattr(self, name, None if part is None else part[row : row + 1])
        self.start_frame = whole.start_frame


class Snake(nn.Module):
    """x + sin²(a x) / a with one a per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha[:, None]
        return x + torch.sin(x * alpha).square() / (alpha + 1e-9)


class ResBlock(nn.Module):
    """Three rounds of Snake, dilated convolution, Snake, convolution, each residual."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, kernel, dilation=d, padding=(kernel - 1) * d // 2))
            for d in dilations
        )
        self.convs2 = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2)) for _ in dilations
        )
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        rounds = zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True)
        for act1, conv1, act2, conv2 in rounds:
            x = x + conv2(act2(conv1(act1(x))))
        return x


class F0Predictor(nn.Module):
    """mel [B, M, T] → F0 in Hz [B, T]."""

    def __init__(self, dims: HiftDims) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(5):
            channels = dims.in_channels if index == 0 else dims.f0_cond_channels
            layers += [weight_norm(nn.Conv1d(channels, dims.f0_cond_channels, 3, padding=1)), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(dims.f0_cond_channels, 1)

    def forward(self, mel: Tensor) -> Tensor:
        return self.classifier(self.condnet(mel).transpose(1, 2))[..., 0].abs()


class HarmonicSource(nn.Module):
    """Sines of F0 and its harmonics, plus noise, mixed to one channel."""

    def __init__(self, dims: HiftDims) -> None:
        super().__init__()
        self.dims = dims
        self.l_linear = nn.Linear(dims.nb_harmonics + 1, 1)

    def sines(self, f0_hz: Tensor) -> Tensor:
        """F0 [B, T] → [B, S, H]: the phase is summed at frame rate, then interpolated linearly to samples."""
        dims = self.dims
        harmonics = torch.arange(1, dims.nb_harmonics + 2, device=f0_hz.device, dtype=f0_hz.dtype)
        cycles = torch.remainder(f0_hz[..., None] * harmonics / dims.sampling_rate, 1.0)  # per sample
        phase = cycles.cumsum(dim=1) * 2 * math.pi
        phase = nn.functional.interpolate(
            phase.transpose(1, 2) * dims.samples_per_frame, scale_factor=float(dims.samples_per_frame), mode="linear"
        )
        return torch.sin(phase.transpose(1, 2))

    def forward(self, f0_hz: Tensor, noise: Tensor | None = None) -> Tensor:
        """→ source [B, 1, S]; `noise` [B, S, H] replaces the random draw."""
        dims = self.dims
        sines = self.sines(f0_hz)
        voiced = (f0_hz > dims.nsf_voiced_threshold).to(sines.dtype)
        voiced = voiced.repeat_interleave(dims.samples_per_frame, dim=1)[..., None]
        loudness = voiced * dims.nsf_sigma + (1 - voiced) * dims.nsf_alpha / 3
        noise = torch.randn_like(sines) if noise is None else noise
        mixed = self.l_linear(sines * dims.nsf_alpha * voiced + loudness * noise)
        return torch.tanh(mixed).transpose(1, 2)


class HiftVocoder(nn.Module):
    """mel [B, M, T] → waveform [B, T * samples_per_frame]."""

    def __init__(self, dims: HiftDims) -> None:
        super().__init__()
        self.dims = dims
        base, rates = dims.base_channels, dims.upsample_rates
        bins, source_blocks = dims.istft_n_fft + 2, dims.source_blocks()
        self.f0_predictor = F0Predictor(dims)
        self.m_source = HarmonicSource(dims)
        self.conv_pre = weight_norm(nn.Conv1d(dims.in_channels, base, 7, padding=3))
        self.ups, self.source_downs = nn.ModuleList(), nn.ModuleList()
        self.source_resblocks, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for i, (rate, kernel) in enumerate(zip(rates, dims.upsample_kernel_sizes, strict=True)):
            channels = base >> (i + 1)
            up = nn.ConvTranspose1d(base >> i, channels, kernel, rate, padding=(kernel - rate) // 2)
            self.ups.append(weight_norm(up))
            stride = math.prod(rates[i + 1 :])  # from the source's STFT rate down to this stage's rate
            down = (1, 1, 0) if stride == 1 else (2 * stride, stride, stride // 2)
            self.source_downs.append(nn.Conv1d(bins, channels, *down))
            self.source_resblocks.append(ResBlock(channels, *source_blocks[i]))
            for size, dilations in dims.stage_blocks():
                self.resblocks.append(ResBlock(channels, size, dilations))
        self.conv_post = weight_norm(nn.Conv1d(base >> len(rates), bins, 7, padding=3))
        self.register_buffer("window", torch.hann_window(dims.istft_n_fft), persistent=False)
        samples = dims.overlap_frames * dims.samples_per_frame
        fade = torch.hamming_window(2 * samples, periodic=False, dtype=torch.float64)
        self.register_buffer("fade", fade, persistent=False)

    def fold_weight_norm(self) -> HiftVocoder:
        """Replace g * v / |v| by the plain weight (serving; the state_dict then has plain keys)."""
        for module in self.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        return self

    def new_state(self) -> HiftState:
        return HiftState()

    def forward(
        self,
        mel: Tensor,
        noise: Tensor | None = None,
        carried_source: Tensor | None = None,
        fixed: FixedCall | None = None,
    ) -> tuple[Tensor, Tensor]:
        """→ (waveform [B, S], source [B, 1, S]); `carried_source` overwrites the start of the source. `fixed` runs all
        but the inverse STFT, which asks the device for a number, in fixed shapes: a batch is filled up by its first
        row."""
        carried = mel.new_zeros(len(mel), 1, 0) if carried_source is None else carried_source
        if fixed is None:
            before, source = self._shaped(mel, carried, *(() if noise is None else (noise,)))
            return self._wave(before), source
        rows = len(mel)
        index = torch.tensor([*range(rows), *[0] * (bucket(rows, ROW_BUCKETS) - rows)], device=mel.device)
        assert noise is not None, "fixed shapes take the noise as it is given"
        key = ("hift", len(index), mel.shape[-1], carried.shape[-1])
        before, source = fixed(key, self._shaped, [mel[index], carried[index], noise])
        return self._wave(before[:rows]), source[:rows].clone()

    def _shaped(self, mel: Tensor, carried: Tensor, *noise: Tensor) -> tuple[Tensor, Tensor]:
        """What the inverse STFT takes [B, bins, F], and the source."""
        source = self.m_source(self.f0_predictor(mel), *noise)
        if carried.shape[-1]:
            source = torch.cat((carried, source[..., carried.shape[-1] :]), dim=-1)
        return self._before_istft(mel, source), source

    def decode(self, mel: Tensor, source: Tensor) -> Tensor:
        """mel and a given source [B, 1, S] → waveform [B, S]."""
        return self._wave(self._before_istft(mel, source))

    def _before_istft(self, mel: Tensor, source: Tensor) -> Tensor:
        dims = self.dims
        spectrum = torch.stft(
            source[:, 0], dims.istft_n_fft, dims.istft_hop_len, window=self.window, center=True, return_complex=True
        )
        spectrum = torch.cat((spectrum.real, spectrum.imag), dim=1)
        x = self.conv_pre(mel)
        per_stage = len(dims.resblock_kernel_sizes)
        for i, up in enumerate(self.ups):
            x = up(nn.functional.leaky_relu(x, dims.lrelu_slope))
            if i == len(self.ups) - 1:
                x = nn.functional.pad(x, (1, 0), mode="reflect")  # the centred STFT has one frame more
            x = x + self.source_resblocks[i](self.source_downs[i](spectrum))
            blocks = self.resblocks[i * per_stage : (i + 1) * per_stage]
            x = torch.stack([block(x) for block in blocks]).mean(dim=0)
        return self.conv_post(nn.functional.leaky_relu(x))

    def _wave(self, x: Tensor) -> Tensor:
        dims = self.dims
        bins = dims.istft_n_fft // 2 + 1
        magnitude, phase = torch.exp(x[:, :bins]).clamp(max=_MAX_MAGNITUDE), torch.sin(x[:, bins:])
        wave = torch.istft(torch.polar(magnitude, phase), dims.istft_n_fft, dims.istft_hop_len, window=self.window)
        return wave.clamp(-dims.audio_limit, dims.audio_limit)

    def push(
        self,
        mel: Tensor,
        state: HiftState,
        is_final: bool = False,
        noise: Tensor | None = None,
        fixed: FixedCall | None = None,
    ) -> Tensor:
        """Feed T mel frames [B, M, T]; returns the samples that became final [B, S]. The last 8 frames wait for the
        next piece.

        A turn's last piece may have any length: `fixed`, which wants few shapes, is for the others. Pieces of no more
        than `overlap_frames` are gathered, as there must be something new behind the overlap.
        """
        dims = self.dims
        if state.mel is not None:
            mel = torch.cat((state.mel, mel), dim=-1)
        if mel.shape[-1] == 0:
            return mel.new_zeros(mel.shape[0], 0)
        if not is_final and mel.shape[-1] <= dims.overlap_frames + (state.tail is not None):
            state.mel = mel
            return mel.new_zeros(mel.shape[0], 0)
        if noise is None:
            noise = self.noise(state.start_frame, mel)
        wave, source = self(mel, noise, state.source, None if is_final else fixed)
        overlap = self.fade.shape[0] // 2
        if state.tail is not None:
            rising, falling = self.fade[:overlap], self.fade[overlap:]
            head = (wave[:, :overlap] * rising + state.tail * falling).to(wave.dtype)
            wave = torch.cat((head, wave[:, overlap:]), dim=1)
        if is_final:
            return wave
        state.mel, state.source, state.tail = (
            mel[..., -dims.overlap_frames :],
            source[..., -overlap:],
            wave[:, -overlap:],
        )
        state.start_frame += mel.shape[-1] - dims.overlap_frames
        return wave[:, :-overlap]

    def noise(self, first_frame: int, mel: Tensor) -> Tensor:
        """The source's noise for these frames of a turn [1, S, H], read from a fixed table, so that a turn sounds the
        same in any pieces and any company."""
        dims = self.dims
        first, count = first_frame * dims.samples_per_frame, mel.shape[-1] * dims.samples_per_frame
        index = torch.arange(first, first + count, device=mel.device).remainder(_NOISE_SAMPLES)
        return _noise_table(dims.nb_harmonics + 1, mel.device)[index].to(mel)[None]


@functools.lru_cache(maxsize=2)
def _noise_table(channels: int, device: torch.device) -> Tensor:
    return torch.randn(_NOISE_SAMPLES, channels, generator=torch.Generator().manual_seed(0)).to(device)


def groups_of_equal_shape(
    mels: Sequence[Tensor], states: Sequence[HiftState], finals: Sequence[bool]
) -> list[list[int]]:
    """Which rows can share a pass: as many new and carried frames, at the same place of the noise, final or not."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for row, (mel, state, is_final) in enumerate(zip(mels, states, finals, strict=True)):
        carried = 0 if state.mel is None else state.mel.shape[-1]
        key = (mel.shape[-1], carried, state.tail is None, state.start_frame, is_final)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def stack_states(states: Sequence[HiftState]) -> HiftState:
    """States of one group as one."""
    parts = [[getattr(state, name) for state in states] for name in ("mel", "source", "tail")]
    mel, source, tail = (None if part[0] is None else torch.cat(part) for part in parts)
    return HiftState(mel, source, tail, states[0].start_frame)


def hift_keys(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released files in today's names: drops `generator.`, turns `weight_g`/`weight_v` into the parametrised form."""
    renamed = {}
    for name, value in weights.items():
        name = name.removeprefix("generator.")
        name = name.replace(".weight_g", ".parametrizations.weight.original0")
        renamed[name.replace(".weight_v", ".parametrizations.weight.original1")] = value
    return renamed
