"""The parents' tokenizers from their own files, as `tokenizers.Tokenizer`, so that the rest knows one kind.

    tokenizer.json            Qwen2.5-Instruct: as it is
    vocab.json + merges.txt   CosyVoice 2's BlankEN: Qwen2's byte-level BPE, plus the marks that CosyVoice adds
    *.model                   SenseVoice: a SentencePiece model (BPE or unigram); its protobuf is read here

Special tokens keep the ids of the files. Knows nothing of modules. Read once, at the start. Sources: transformers'
`Qwen2Tokenizer`, CosyVoice `cosyvoice/tokenizer/tokenizer.py`, `sentencepiece_model.proto` (field numbers).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from minmo_runtime.public_files import PublicFileError

# Qwen2's split of text before BPE.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Added by CosyVoice 2 behind what BlankEN's own files list, in this order; those already there keep their id.
COSYVOICE_MARKS = (
    "<|im_start|> <|im_end|> <|endofprompt|> [breath] <strong> </strong> [noise] [laughter] [cough] [clucking] "
    "[accent] [quick_breath] <laughter> </laughter> [hissing] [sigh] [vocalized-noise] [lipsmack] [mn]"
).split()

# SentencePiece's kinds of piece.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2


def load_tokenizer(path: Path) -> Tokenizer:
    """By the file's name; PublicFileError says what is missing."""
    if not path.is_file():
        raise PublicFileError(f"{path}: not there")
    if path.suffix == ".model":
        return sentencepiece_tokenizer(path)
    if path.name == "vocab.json":
        return cosyvoice_tokenizer(path.parent)
    return Tokenizer.from_file(str(path))


def cosyvoice_tokenizer(folder: Path) -> Tokenizer:
    """`CosyVoice-BlankEN`: vocab.json, merges.txt, and the special tokens of tokenizer_config.json."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not merges.is_file():
        raise PublicFileError(f"{merges}: not there; it belongs to {vocab.name}")
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    settings = folder / "tokenizer_config.json"
    listed = (
        json.loads(settings.read_text(encoding="utf-8")).get("added_tokens_decoder", {}) if settings.is_file() else {}
    )
    for token_id, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        tokenizer.add_special_tokens([AddedToken(entry["content"], normalized=False, special=True)])
        if tokenizer.token_to_id(entry["content"]) != int(token_id):
            raise PublicFileError(f"{settings}: {entry['content']} must be {token_id}, the vocabulary ends before")
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in COSYVOICE_MARKS])
    return tokenizer


# --------------------------------------------------------------- SentencePiece


@dataclass
class _Model:
    """What of a ModelProto decides how text is cut."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # text, score, kind
    model_type: int = _UNIGRAM
    char_map: bytes = b""
    has_dummy_prefix: bool = True
    joins_spaces: bool = True  # none at the ends, one between words


def sentencepiece_tokenizer(path: Path) -> Tokenizer:
    model = _read_model(path)
    vocab = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
    unknown = next((piece for piece, _, kind in model.pieces if kind == _UNKNOWN), None)
    has_bytes = any(kind == _BYTE for _, _, kind in model.pieces)
    if model.model_type == _BPE:
        merges = _merges(model)
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes))
    else:
        scores = [(piece, score) for piece, score, _ in model.pieces]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=vocab.get(unknown or "", 0), byte_fallback=has_bytes))
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(model.char_map)] if model.char_map else []
    if model.joins_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    prepend = "always" if model.has_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    # Never text: tags, and what stands for a character that the model does not have.
    marks = [piece for piece, _, kind in model.pieces if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    return tokenizer


def _merges(model: _Model) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose union has the best score; as a list of pairs, best first."""
    scores = {piece: score for piece, score, kind in model.pieces if kind in (_NORMAL, _UNUSED)}
    order = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
    found: list[tuple[float, int, int, str, str]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, order[left], order[right], left, right))
    return [(left, right) for _, _, _, left, right in sorted(found)]


def _read_model(path: Path) -> _Model:
    model = _Model()
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                model.pieces.append(_piece(value))
            elif number == 2:
                model.model_type = next((int(v) for n, v in _fields(value) if n == 3), _UNIGRAM)
            elif number == 3:
                for inner, content in _fields(value):
                    if inner == 2:
                        model.char_map = content
                    elif inner == 3:
                        model.has_dummy_prefix = bool(content)
                    elif inner == 4:
                        model.joins_spaces = bool(content)
    except (IndexError, struct.error, TypeError, UnicodeDecodeError) as error:
        raise PublicFileError(f"{path}: not a SentencePiece model: {error!r}") from error
    if not model.pieces:
        raise PublicFileError(f"{path}: not a SentencePiece model: it holds no pieces")
    if model.model_type not in (_UNIGRAM, _BPE):
        raise PublicFileError(f"{path}: SentencePiece model type {model.model_type}: must be 1 (unigram) or 2 (BPE)")
    return model


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = value.decode("utf-8")
        elif number == 2:
            score = struct.unpack("<f", value)[0]
        elif number == 3:
            kind = int(value)
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Field numbers and values of one protobuf message; a varint comes as an int (typed loosely as bytes)."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value  # type: ignore[misc]  # a varint
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            yield number, data[position : position + size]
            position += size
        elif wire == 2:
            size, position = _varint(data, position)
            yield number, data[position : position + size]
            position += size
        else:
            raise TypeError(f"wire type {wire}")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
