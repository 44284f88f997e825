"""Builds nano's text tokenizer: whole words of the domain, pieces for others, single digits, Hanzi, bytes.

Every word has one form wherever it stands (no variant with a leading space), so that a value said by the caller and the
same value in a tool call are the same token. Continuations inside a word are marked by "##". Stage 0a; writes
text_tokenizer.json.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minmo_runtime.text import TextTokenizer, normalise_spoken, system_prompt
from minmo_runtime.training import corpus, general, sentences
from minmo_runtime.training.stage import StageConfig

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<|turn_of_speech|>",
)
VOCAB_LIMIT = 8192
# Words of tool lines, roles and styles that the sentences may not hold often enough.
LINE_WORDS = """system user assistant look_up_order order_number opening_hours change_delivery transfer hang_up
request_callback status day open close closed result shipped delivered delayed preparing being packed returned cancelled
unpaid not_found changed too_late busy connecting stored error keypad neutral friendly calm cheerful sad sorry serious
warm brisk slow normal fast slowly quickly speak voice pace
english mandarin chinese please digits number""".split()


def hanzi() -> list[str]:
    """The 3755 characters of GB 2312 level 1 (rows 16 to 55)."""
    found = []
    for row in range(0xB0, 0xD8):
        for cell in range(0xA1, 0xFF):
            try:
                found.append(bytes((row, cell)).decode("gb2312"))
            except UnicodeDecodeError:
                continue  # the last row is not full
    return found


def word_counts(seed: int = 0) -> Counter[str]:
    """How often each word is used by the domain; words of general English at least a little."""
    counts: Counter[str] = Counter()
    for text in sentences.caller_utterances(seed, "train", 20_000):
        counts.update(normalise_spoken(text).split())
        counts.update(text.split())
    rng = random.Random(seed)
    for text in sentences.agent_utterances(seed, "train", 20_000):
        counts.update(text.replace(".", " ").replace(",", " ").replace("?", " ").split())
    for _ in range(200):
        style = f"speak in a {rng.choice(('calm', 'friendly'))} voice at a normal pace."
        counts.update(
            system_prompt(rng.choice(corpus.NAMES), rng.choice(corpus.SHOPS), style).replace(".", " ").split()
        )
    for word in (*LINE_WORDS, *general.ALL_WORDS, *corpus.DAYS, *corpus.NAMES, *" ".join(corpus.SHOPS).split()):
        counts[word] += 50
    return counts


def build(seed: int = 0) -> Tokenizer:
    """Train the pieces and assemble the tokenizer; deterministic for a seed."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, continuing_subword_prefix="##", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pieces = Regex(r"[0-9]|\p{Han}|[\p{Latin}_]+(?:'[\p{Latin}]+)*|[^\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pieces, behavior="isolated")]
    )
    letters = "abcdefghijklmnopqrstuvwxyz"
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_LIMIT,
        min_frequency=1,
        special_tokens=[*SPECIAL_TOKENS, *byte_tokens],
        initial_alphabet=[*"0123456789", *".,?!:;-'", *letters, *hanzi()],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    counts = word_counts(seed)
    every_form = [f"{first}{second}" for first in letters for second in (*letters, "_", "'a")]
    lines = [" ".join([word] * min(count, 2000)) for word, count in sorted(counts.items())]
    tokenizer.train_from_iterator([*lines, " ".join(every_form)], trainer)
    return _finish(tokenizer)


def _finish(tokenizer: Tokenizer) -> Tokenizer:
    """Bytes become plain vocabulary (else they would be skipped as special), and the decoder is attached."""
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=[0-9]) (?=[0-9])"), ""),
            decoders.Replace(Regex(r"(?<=\p{Han}) (?=\p{Han})"), ""),
            decoders.Replace(Regex(r" (?=[.,?!:;])"), ""),
        ]
    )
    table = json.loads(tokenizer.to_str())
    table["added_tokens"] = [token for token in table["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(table, ensure_ascii=False))


def write(path: Path, seed: int = 0) -> Tokenizer:
    tokenizer = build(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path), pretty=False)
    return tokenizer


TOKENIZER_FILE = "text_tokenizer.json"


def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]:
    """Write the tokenizer once (its ids are in every later weight file) and measure it on the agent's sentences."""
    path = work_dir / "ship" / TOKENIZER_FILE
    if not path.exists():
        write(path, stage.seed)
    tokenizer = TextTokenizer.from_file(path)
    callers = sentences.caller_utterances(stage.seed + 1, "train", 2000)
    texts = callers + sentences.agent_utterances(stage.seed + 1, "train", 2000)
    words = {word for text in callers for word in text.split()}  # the agent's hold made-up names, which are pieces
    num_whole = sum(len(tokenizer.encode(word)) == 1 for word in words)
    num_words = sum(len(text.split()) for text in texts)
    return {
        "whole_words": num_whole / len(words),
        "n_words": float(len(words)),
        "tokens_per_word": sum(len(tokenizer.encode(text)) for text in texts) / num_words,
        "vocab_size": float(tokenizer.vocab_size),
    }
