"""How speech made by a stage is understood: words of voice tokens and of waveforms, by our own recogniser.

Judge and speaker are both ours and trained on the same kind of voice; no outside recogniser is involved (said in the
model card). Definitions: docs/evaluation.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from minmo_runtime.model.encoder import collapse
from minmo_runtime.model.flow import Flow
from minmo_runtime.model.flow_dims import FlowDims
from minmo_runtime.text import speak_digits
from minmo_runtime.training.data import plain_words
from minmo_runtime.training.encoder import word_error_rate
from minmo_runtime.training.flow import load_shipped_vocoder, make_waves
from minmo_runtime.training.listener import Listener
from minmo_runtime.training.resume import load_tensors
from minmo_runtime.training.stage import part_file
from minmo_runtime.training.tokenizer import load_tokenizer


def spoken_words(text: str) -> str:
    """What a recogniser should write for an agent sentence: digits as words, no punctuation."""
    return plain_words(speak_digits(text))


@torch.no_grad()
def wer_of_codes(work_dir: Path, texts: Sequence[str], codes: Sequence[Sequence[int]]) -> tuple[float, int]:
    """(WER, words) of voice tokens, understood through the voice tokenizer's own upper half: no flow, no vocoder."""
    tokenizer = load_tokenizer(work_dir)
    pieces = Tokenizer.from_file(str(work_dir / "ship" / "ctc_tokenizer.json"))
    heard = []
    for row in codes:
        if not len(row):
            heard.append("")
            continue
        ids = torch.tensor([list(map(int, row))])
        log_probs = tokenizer.ctc_from_tokens(ids, torch.tensor([ids.shape[1]]))
        heard.append(pieces.decode(collapse(log_probs[0].argmax(-1))).strip())
    return word_error_rate([spoken_words(text) for text in texts], heard)


@torch.inference_mode()
def wer_of_waves(work_dir: Path, texts: Sequence[str], codes: Sequence[Sequence[int]]) -> tuple[float, int]:
    """(WER, words) of voice tokens made audible by the shipped flow and vocoder and heard by the shipped encoder."""
    table = json.loads(part_file(work_dir, "flow").with_suffix(".json").read_text())
    table.pop("code_hash", None)
    flow = Flow(FlowDims.from_dict(table)).eval()
    flow.load_state_dict({name: t.float() for name, t in load_tensors(part_file(work_dir, "flow"))[0].items()})
    embedding = torch.zeros(1, flow.dims.spk_embed_dim)
    mels = [flow(torch.tensor([list(map(int, row)) or [0]]), embedding) for row in codes]
    waves = make_waves(load_shipped_vocoder(work_dir), mels)
    heard = Listener(work_dir).score([spoken_words(text) for text in texts], waves)
    return heard.wer, heard.words


def can_be_heard(work_dir: Path) -> bool:
    """Whether flow and vocoder are there."""
    return all(part_file(work_dir, part).exists() for part in ("flow", "vocoder"))
