"""A corpus: streams of tokens to train on and to validate on, the windows cut from them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNITS = ("byte", "character")
Stream = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token streams for training and validation, and the hash that pins them.

    Whatever the corpus was loaded from, equal streams of equal units have the same `sha256`.
    """

    name: str  # as it was asked for
    unit: str  # "byte" | "character": what a token is
    train: Stream  # (tokens,), perhaps a memory map
    validation: Stream  # likewise
    vocab_size: int  # 256 for bytes; for characters, how many the corpus has
    sha256: str  # of both streams, where they part, and what their tokens stand for
    documents: int
    bytes_per_token: float  # UTF-8 bytes of the validation stream over its tokens
    alphabet: str | None = None  # of characters: token n stands for alphabet[n]

    def batch(self, batch: int, seq_len: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random training windows: inputs and next tokens, each (B, T) int64.

        Equal states of the generator give equal windows.

        Raises:
            ValueError: the training stream is shorter than T + 1.
        """
        self.check_training(seq_len)
        starts = torch.randint(len(self.train) - seq_len, (batch,), generator=generator)
        windows = _cut(self.train, starts.tolist(), seq_len)
        return windows[:, :-1], windows[:, 1:]

    def validation_windows(self, seq_len: int, tokens: int, block: int) -> tuple[Tensor, Tensor]:
        """The windows to validate on: inputs and next tokens, each (windows, T) int64.

        Blocks of tokens, spread evenly over the validation stream, are cut into windows: every T
        that divides the block is validated on the same targets, in the same order.

        Args:
            seq_len: T.
            tokens: about how many targets; whole blocks of them, at least one, and at most as many
                as the stream holds without overlap.
            block: tokens of a block.

        Raises:
            ValueError: T does not divide the block, or the stream is shorter than a block + 1.
        """
        self.check_validation(seq_len, block)
        places = len(self.validation) - 1  # of targets
        blocks = min(max(1, tokens // block), places // block)
        starts = [number * places // blocks for number in range(blocks)]
        pieces = _cut(self.validation, starts, block)
        return pieces[:, :-1].reshape(-1, seq_len), pieces[:, 1:].reshape(-1, seq_len)

    def check_training(self, seq_len: int) -> None:
        """ValueError where no training window of length T fits."""
        if len(self.train) <= seq_len:
            raise ValueError(
                f"{self.name}: {len(self.train):,} training tokens are too few for T = {seq_len}, "
                f"which takes {seq_len + 1:,}: give a shorter T or a larger corpus"
            )

    def check_validation(self, seq_len: int, block: int) -> None:
        """ValueError where T does not divide the block, or no block fits."""
        if block % seq_len:
            raise ValueError(
                f"T = {seq_len} does not divide the validation block of {block} tokens: "
                f"give a block that is a multiple of every T"
            )
        if len(self.validation) <= block:
            raise ValueError(
                f"{self.name}: {len(self.validation):,} validation tokens are too few for a block "
                f"of {block}, which takes {block + 1:,}: give a smaller block or a larger corpus"
            )


def pin(unit: str, alphabet: str | None, train_tokens: int, tokens_sha256: str) -> str:
    """The `sha256` of a corpus.

    Args:
        unit: what a token is.
        alphabet: what characters stand for.
        train_tokens: where the streams part.
        tokens_sha256: of the tokens of both streams, little-endian, training first.
    """
    header = json.dumps([unit, alphabet, train_tokens, tokens_sha256])
    return hashlib.sha256(header.encode()).hexdigest()


def _cut(stream: Stream, starts: list[int], length: int) -> Tensor:
    """The tokens from each start on, and the one after: (starts, length + 1) int64."""
    windows = np.stack([stream[start : start + length + 1] for start in starts])
    return torch.from_numpy(windows.astype(np.int64))
