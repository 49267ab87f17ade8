"""Real text to train on, by name, as tokens: of Python's own sources where nothing else is asked.

Corpora are named as in

- "python-source": the sources of Python's standard library and of torch; needs no network;
- "files:GLOB": the files that a glob matches (** goes down into folders, ~ is the home directory);
- "memmap:PATH": a token file that `prepare` wrote;
- "hf:NAME" or "hf:NAME:CONFIG": column "text" of split "train" of a data set of Hugging Face.

A file, or a row, is a document. Documents go whole to training or to validation, by the hash of
their names, and each ends with a separator. One document alone is parted at 90 % instead, and
stays as it is.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array, csr_array

from harness import token_file
from harness.corpus import UNITS, Corpus, Stream, pin
from harness.documents import Documents, files, hub, python_source
from harness.token_file import smallest_dtype

VALIDATION_SHARE = 16  # one document in 16
TRAINING_PART = 0.9  # of one document; nanoGPT parts tiny Shakespeare like this
SEPARATOR = b"\0"  # never occurs in text
FORMS = {
    "python-source": "python-source",
    "files": "files:GLOB",
    "memmap": "memmap:PATH",
    "hf": "hf:NAME",
}
PAIRS = 1 << 22  # of neighbouring tokens, counted at once

OnProgress = Callable[[int, int], None]  # documents read, documents in all


def _quiet(done: int, total: int) -> None:
    """Report nothing."""


@functools.cache
def load(name: str, unit: str = "byte") -> Corpus:
    """The corpus of a name; a process loads it once, and does not see files change after that.

    Args:
        name: one of the forms above.
        unit: what a token is: "byte", or "character" for text in UTF-8.

    Raises:
        ValueError: no such corpus or unit, nothing to read, not text where characters are asked
            for, a token file of the other unit or with a bad sidecar, `datasets` not installed or
            without a network; one line that names the fix.
        OSError: a file cannot be read.
    """
    return _load(name, unit, _quiet)


def prepare(source: str, out: Path, unit: str = "byte", on_progress: OnProgress = _quiet) -> Corpus:
    """Write a corpus as a token file with its sidecar, for `memmap:OUT`, and load it from there.

    Args:
        source: the name of a corpus.
        out: the token file to write or replace; its sidecar is OUT.json.
        unit: what a token is.
        on_progress: called with the number of documents read, and of all.

    Raises:
        ValueError: as for `load`, or `out` is a directory.
        OSError: as for `load`, or disk full, or no permission.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a directory: give the file to write")
    out.parent.mkdir(parents=True, exist_ok=True)
    token_file.write(out, _load(source, unit, on_progress))
    load.cache_clear()  # it may hold what the file was before
    return token_file.read(out)


def check(corpus: Corpus, seq_lens: Sequence[int], block: int, validation_tokens: int) -> None:
    """ValueError for the first length that a corpus cannot be trained or validated at.

    Args:
        corpus: what is asked of.
        seq_lens: the lengths T of windows.
        block: tokens of a validation block.
        validation_tokens: about how many tokens are validated.
    """
    if validation_tokens < 1:
        raise ValueError(f"validation takes at least one token, got {validation_tokens}")
    for seq_len in seq_lens:
        corpus.check_training(seq_len)
        corpus.check_validation(seq_len, block)


def entropies(stream: Stream, vocab_size: int) -> tuple[float, float]:
    """The entropy of a token, and of a token where the one before it is known, in bits a token.

    They are those of the stream's own counts: what a model that knew these exactly would lose.

    Args:
        stream: (tokens,), at least two.
        vocab_size: tokens are below it.

    Raises:
        ValueError: fewer than two tokens.
    """
    if len(stream) < 2:
        raise ValueError(f"an entropy of pairs takes two tokens, got {len(stream)}")
    pairs = csr_array((vocab_size, vocab_size), dtype=np.int64)
    for start in range(0, len(stream) - 1, PAIRS):
        piece = stream[start : start + PAIRS + 1].astype(np.int64)
        ones = np.ones(len(piece) - 1, dtype=np.int64)
        pairs += coo_array((ones, (piece[:-1], piece[1:])), shape=pairs.shape).tocsr()
    before = pairs.sum(axis=1)  # (vocab_size,): how often each has a successor
    counts = before.copy()
    counts[stream[-1]] += 1
    return _bits(counts), _bits(pairs.data) - _bits(before)


def _bits(counts: np.ndarray) -> float:
    """The entropy of counts, in bits."""
    shares = counts[counts > 0] / counts.sum()
    return float((shares * -np.log2(shares)).sum())


def _load(name: str, unit: str, on_progress: OnProgress) -> Corpus:
    from harness.sweep import unknown

    if unit not in UNITS:
        raise ValueError(unknown("unit", unit, UNITS))
    kind, _, rest = name.partition(":")
    if kind not in FORMS:
        close = get_close_matches(kind, FORMS, n=1)
        hint = f"; did you mean {FORMS[close[0]]!r}?" if close else ""
        raise ValueError(
            f"unknown corpus {name!r}, expected one of {', '.join(FORMS.values())}{hint}"
        )
    if bool(rest) != (":" in FORMS[kind]):
        raise ValueError(f"corpus {name!r}: expected {FORMS[kind]}")
    if kind == "memmap":
        corpus = token_file.read(Path(rest).expanduser())
        if corpus.unit != unit:
            raise ValueError(
                f"{name}: a token is a {corpus.unit}, not a {unit}: ask for unit {corpus.unit}"
            )
        return replace(corpus, name=name)
    if kind == "files":
        return _tokens(name, unit, files(rest), on_progress)
    return _tokens(name, unit, hub(rest) if kind == "hf" else python_source(), on_progress)


def _tokens(name: str, unit: str, documents: Documents, on_progress: OnProgress) -> Corpus:
    """Read documents, part them and make tokens of them."""
    names = documents.names
    held_out = _held_out(names) if len(names) > 1 else set()
    separator = SEPARATOR if len(names) > 1 else b""
    streams = bytearray(), bytearray()  # of training and of validation
    for number, document in enumerate(names, start=1):
        text = documents.read(document)
        if unit == "character":
            _check_text(name, document, text)
        streams[document in held_out].extend(text + separator)
        on_progress(number, len(names))
    texts_bytes = sum(map(len, streams)) - len(names) * len(separator)
    if not separator:
        streams = _cut_in_two(streams[0], unit)
    if not texts_bytes or not streams[0]:
        raise ValueError(f"{name}: {texts_bytes} bytes in {len(names)} documents: give more text")
    alphabet = None
    if unit == "byte":
        train, validation = (np.frombuffer(stream, np.uint8) for stream in streams)
    else:
        alphabet, (train, validation) = _characters(streams)
    digest = hashlib.sha256(train.data)
    digest.update(validation.data)
    return Corpus(
        name=name,
        unit=unit,
        train=train,
        validation=validation,
        vocab_size=256 if alphabet is None else len(alphabet),
        sha256=pin(unit, alphabet, len(train), digest.hexdigest()),
        documents=len(names),
        bytes_per_token=len(streams[1]) / len(validation),
        alphabet=alphabet,
    )


def _held_out(names: Sequence[str]) -> set[str]:
    """The documents to validate on: those whose hash says so, or the one of the smallest hash."""
    hashes = {name: hashlib.sha256(os.fsencode(name)).digest() for name in names}
    found = {name for name in names if hashes[name][0] % VALIDATION_SHARE == 0}
    return found if 0 < len(found) < len(names) else {min(names, key=hashes.__getitem__)}


def _cut_in_two(text: bytearray, unit: str) -> tuple[bytearray, bytearray]:
    """The first 90 % of the tokens of a text, and the others."""
    if unit == "byte":
        cut = int(TRAINING_PART * len(text))
    else:
        characters = text.decode()
        cut = len(characters[: int(TRAINING_PART * len(characters))].encode())
    return text[:cut], text[cut:]


def _check_text(name: str, document: str, text: bytes) -> None:
    """ValueError where a document is no text of characters."""
    try:
        text.decode()
    except UnicodeDecodeError:
        fault = "not UTF-8 text"
    else:
        if SEPARATOR not in text:
            return
        fault = "not text (it has a NUL)"
    raise ValueError(f"{name}: {document!r} is {fault}: ask for unit byte instead of character")


def _characters(streams: Sequence[bytearray]) -> tuple[str, list[Stream]]:
    """The sorted distinct characters of UTF-8 streams, and the streams as indices into them."""
    points = [np.frombuffer(stream.decode().encode("utf-32-le"), "<u4") for stream in streams]
    distinct = np.unique(np.concatenate([np.unique(stream) for stream in points]))
    token = np.zeros(int(distinct[-1]) + 1, smallest_dtype(len(distinct)))
    token[distinct] = np.arange(len(distinct))
    return "".join(map(chr, distinct)), [token[stream] for stream in points]
