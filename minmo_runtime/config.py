"""Settings of the engine; `agent/config.py` fills them from the `[runtime]` section of config.toml. Knows no file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RuntimeConfig:
    """How one engine process serves its calls. The model's own numbers are not here: they come with the checkpoint."""

    profile: str = "nano"
    """Which model: nano, nano-human, minmo-small, minmo-8b, or a folder with a checkpoint.toml (`minmo models list`);
    agent.checkpoint, where set, goes before it."""

    models_folder: str = ""
    """Where the parents' public files lie; empty = $MINMO_MODELS, else ~/.cache/minmo/models."""

    max_streams: int = 4
    """Calls there is memory for at once; the next one is refused (RuntimeOverloaded)."""

    capacity_calls: int = 0
    """Calls this device holds in real time, where less than max_streams; the next one is refused. 0 = measured once at
    the engine's start, and kept in ~/.cache/minmo/capacity.json by device, settings and weights."""

    max_context_tokens: int = 1536
    """Text positions kept per call, prompt and history together; the oldest turns are dropped beyond it."""

    max_reply_tokens: int = 160
    """Text tokens of one reply; a reply that does not end by itself ends here."""

    max_voice_tokens: int = 1500
    """Voice tokens of one turn (25 a second); bounds the voice cache."""

    max_ahead_s: float = 5.0
    """Audio made beyond what the caller has heard; more would be thrown away on an interruption."""

    max_unheard_input_s: float = 30.0
    """Caller audio waiting to be encoded; beyond it the oldest is dropped and the stream says so in its statistics."""

    max_job_ms: float = 25.0
    """A job should take no longer, for everything else waits meanwhile. No pass of a module can be cut short: a longer
    one is named in the log with its part, and counted for the calls in it."""

    prefill_chunk_tokens: int = 48
    """Most text positions of one prefill job."""

    max_shared_prefixes: int = 16
    """Beginnings of calls (system prompt, greeting) whose keys and values are kept for the next call that begins so;
    one that an open call uses stays. 0 = none."""

    urgent_audio_s: float = 0.4
    """A call with less audio than this in hand goes before everything else."""

    preroll_ms: int = 480
    """Caller audio kept from before the voice onset (design §4a)."""

    hangover_ms: int = 640
    """Silence that closes a caller's segment (design §4a)."""

    prediction_ms: int = 160
    """Distance of two duplex predictions on the input clock."""

    draft_probability: float = 0.1
    """P(user_done) above which a reply's text is written ahead of the decision to speak, to be thrown away if the
    caller goes on; 1 = never."""

    num_threads: int = 1
    """torch threads; more than one collapses when another process holds a core (facts/nano.md §1)."""

    device: str = "cpu"
    """Where the modules run: cpu or cuda."""

    dtype: str = "float32"
    """Numbers of weights and caches: float32, or bfloat16 on a GPU."""

    weights: str = "as_stored"
    """Linear layers of the LLM and the voice LM: as_stored (in `dtype`), int8 on a CPU (less than half the time of a
    step of large sizes, a few other words), or fp8 on a GPU that multiplies 8-bit floats (never tried on one)."""

    has_fixed_shapes: bool = False
    """Whether decoding is padded to a few shapes; on a GPU each is one CUDA graph. true pays on a GPU only."""

    sound_rows: int = 1
    """Most calls in one pass of the flow or the vocoder. A CPU gains nothing from more, and they wait for each other;
    a GPU wants all."""

    flow_window_s: float = 2.0
    """Left context of the flow kept per turn, for a checkpoint trained with more; full size costs 115 MB a second."""

    def __post_init__(self) -> None:
        allowed: tuple[tuple[str, float, float], ...] = (
            ("max_streams", 1, 256),
            ("capacity_calls", 0, 256),
            ("max_context_tokens", 64, 131_072),
            ("max_reply_tokens", 8, 4096),
            ("max_voice_tokens", 50, 20_000),
            ("max_ahead_s", 0.5, 60.0),
            ("max_unheard_input_s", 1.0, 120.0),
            ("max_job_ms", 1.0, 1000.0),
            ("prefill_chunk_tokens", 1, 4096),
            ("max_shared_prefixes", 0, 256),
            ("urgent_audio_s", 0.0, 5.0),
            ("preroll_ms", 0, 2000),
            ("hangover_ms", 100, 5000),
            ("prediction_ms", 20, 1000),
            ("draft_probability", 0.0, 1.0),
            ("num_threads", 1, 64),
            ("sound_rows", 1, 256),
            ("flow_window_s", 0.0, 30.0),
        )
        for name, low, high in allowed:
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"runtime.{name} = {value}: must be from {low:g} to {high:g}")
        for name, choices in (
            ("device", ("cpu", "cuda")),
            ("dtype", ("float32", "bfloat16")),
            ("weights", ("as_stored", "int8", "fp8")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"runtime.{name} = {getattr(self, name)!r}: must be {' or '.join(choices)}")
        if self.weights == "int8" and (self.device, self.dtype) != ("cpu", "float32"):
            raise ValueError(
                f"runtime.weights = 'int8': for device cpu and dtype float32, not {self.device}, {self.dtype}"
            )
        if self.weights == "fp8" and self.device != "cuda":
            raise ValueError("runtime.weights = 'fp8': for device cuda, not cpu")
