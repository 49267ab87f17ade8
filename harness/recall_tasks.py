"""What a synthetic task is, and those of associative recall: MQAR, and MAD's three.

B examples, T tokens. Each task states its tokens in the order of their numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

IGNORE = -100  # target where nothing is asked: what torch's cross-entropy leaves out


class Examples(NamedTuple):
    """Sequences, and the answers asked for in them."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64: the token to be answered at this position, or IGNORE


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task at its settings, which are the fields; the defaults are the paper's.

    Attributes:
        vocab_size: tokens that a model needs, special ones included.
        decoder: "next-token": the model's output at a position answers what is asked there;
            "position-mlp": see `Compression`.
    """

    vocab_size: int = 16
    decoder: ClassVar[str] = "next-token"

    @property
    @abstractmethod
    def answers(self) -> int:
        """How many answers are equally likely to one who has not read the sequence."""

    @property
    @abstractmethod
    def shortest(self) -> tuple[int, str]:
        """The least T, and how it follows from the settings."""

    @abstractmethod
    def generate(self, seq_len: int, count: int, generator: Generator, facts_seed: int) -> Examples:
        """Draw `count` sequences of a T that is long enough."""

    def _at_least(self, **least: int) -> None:
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Multi-query associative recall: pairs of a key and a value, then every key once more.

    Arora et al. 2023, "Zoology", arXiv 2312.04927, and multiquery_ar.py of HazyResearch/zoology.
    A sequence's keys differ, and so do its values. After the pairs, every second position may hold
    a query; that the i-th of these does is as likely as i^(power - 1), so that a small power puts
    queries near the pairs and 1 anywhere. At a query the value is asked for, and is not the next
    input. Tokens: 0, which fills the other positions without `random_fill`; keys; values from
    vocab_size // 2 on.

    Differs: random fillers are none of the sequence's keys (zoology's may be, so that a key is also
    followed by what is not its value, before it is asked for). T may be odd, and exceed the
    vocabulary.
    """

    vocab_size: int = 8192
    pairs: int = 4
    power: float = 0.01
    random_fill: bool = True

    def __post_init__(self) -> None:
        self._at_least(pairs=1, vocab_size=2 * self.pairs + 2)  # as many keys, and the filler
        if not 0 < self.power < math.inf:
            raise ValueError(f"power must be positive and finite, got {self.power}")

    @property
    def answers(self) -> int:
        """The values."""
        return self.vocab_size - self.vocab_size // 2

    @property
    def shortest(self) -> tuple[int, str]:
        """The pairs, and two positions for each query."""
        return 4 * self.pairs, "4 * pairs"

    def generate(self, seq_len: int, count: int, generator: Generator, facts_seed: int) -> Examples:
        """Pairs at the start, queries among fillers after them."""
        first_value, told = self.vocab_size // 2, 2 * self.pairs
        keys = 1 + _distinct(first_value - 1, (count, self.pairs), generator)
        values = first_value + _distinct(self.answers, (count, self.pairs), generator)
        inputs = torch.zeros(count, seq_len, dtype=torch.int64)
        if self.random_fill:
            ranks = torch.randint(
                self.vocab_size - self.pairs, (count, seq_len), generator=generator
            )
            inputs = _without(keys, ranks)
        inputs[:, 0:told:2], inputs[:, 1:told:2] = keys, values
        slots = (seq_len - told) // 2
        # Weighted draws without replacement: the largest of log weight + Gumbel noise, in order.
        log_weights = (self.power - 1) * torch.arange(1, slots + 1, dtype=torch.float64).log()
        noise = torch.empty(count, slots, dtype=torch.float64).exponential_(generator=generator)
        at = told + 2 * (log_weights - noise.log()).topk(self.pairs).indices
        targets = torch.full_like(inputs, IGNORE)
        return Examples(inputs.scatter_(1, at, keys), targets.scatter_(1, at, values))


@dataclass(frozen=True, kw_only=True)
class InContextRecall(Task):
    """Pairs of a key and its value throughout; at every repeated key the value is asked for.

    Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures" (MAD), arXiv
    2403.17844, appendix B, and instances.py of athms/mad-lab, in the multi-query form of its
    configuration. Each sequence draws a value for every key; keys may share one. The last key was
    seen before. Tokens: keys, then values.

    Differs: MAD trains on every next token and asks for repeated values only when it evaluates;
    here these are always what is asked. Of an even T the last token is the last key's value, which
    MAD cuts off.
    """

    def __post_init__(self) -> None:
        self._at_least(vocab_size=4)

    @property
    def answers(self) -> int:
        """The values."""
        return self.vocab_size - self.vocab_size // 2

    @property
    def shortest(self) -> tuple[int, str]:
        """A pair, and its key again."""
        return 3, ""

    def generate(self, seq_len: int, count: int, generator: Generator, facts_seed: int) -> Examples:
        """Pairs, none of them noise."""
        noisy = torch.zeros(count, (seq_len + 1) // 2, dtype=torch.bool)
        return _recall(self.vocab_size // 2, self.answers, noisy, seq_len, generator)


@dataclass(frozen=True, kw_only=True)
class NoisyRecall(Task):
    """In-context recall in which a share of the pairs are two tokens of noise instead.

    MAD, as `InContextRecall`. At least one pair and the last one are not noise. Tokens: keys,
    values, noise, the last counted in `vocab_size`.

    Differs: as in-context recall does; and the pair that is kept from noise is never the last one,
    as it may be in MAD, which then can have none to recall.
    """

    vocab_size: int = 32
    noise_vocab_size: int = 16
    noise_share: float = 0.2

    def __post_init__(self) -> None:
        self._at_least(noise_vocab_size=1, vocab_size=self.noise_vocab_size + 4)
        if not 0 <= self.noise_share < 1:
            raise ValueError(f"noise_share must be at least 0 and below 1, got {self.noise_share}")

    @property
    def answers(self) -> int:
        """The values."""
        recalled = self.vocab_size - self.noise_vocab_size
        return recalled - recalled // 2

    @property
    def shortest(self) -> tuple[int, str]:
        """A pair, and its key again."""
        return 3, ""

    def generate(self, seq_len: int, count: int, generator: Generator, facts_seed: int) -> Examples:
        """Pairs, some of them overwritten with noise."""
        slots, first_noise = (seq_len + 1) // 2, self.vocab_size - self.noise_vocab_size
        noisy = torch.rand(count, slots, generator=generator) < self.noise_share
        noisy[:, -1] = False
        noisy.scatter_(1, torch.randint(slots - 1, (count, 1), generator=generator), False)
        inputs, targets = _recall(first_noise // 2, self.answers, noisy, seq_len, generator)
        noise = torch.randint(first_noise, self.vocab_size, inputs.shape, generator=generator)
        at = noisy.repeat_interleave(2, 1)[:, :seq_len]
        return Examples(torch.where(at, noise, inputs), targets)


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(Task):
    """In-context recall of keys and values that are several tokens long.

    MAD, as `InContextRecall`. A key is 1 to `key_motif` different tokens, a value 1 to
    `value_motif`; lengths are equally likely, and so are all keys and values of a length. After a
    key that was seen before, all its value's tokens are asked for, one at a time. The last key was
    seen before. The start is padded to T. Tokens: keys, values, padding.

    Differs: as in-context recall does; MAD evaluates with keys of the full length only, here they
    vary as they do in its training; and in a few of MAD's sequences the last key is a new one.
    """

    key_motif: int = 3
    value_motif: int = 3

    def __post_init__(self) -> None:
        self._at_least(key_motif=1, value_motif=1)
        keys, values = max(self.key_motif, 2), max(self.value_motif, 2)
        self._at_least(vocab_size=1 + max(2 * keys, 2 * values - 1))
        if self.key_motif * math.log2(self._keys + 1) > 62:  # a key must fit into an int64
            raise ValueError(f"lower key_motif = {self.key_motif}, or vocab_size")

    @property
    def _keys(self) -> int:
        return (self.vocab_size - 1) // 2

    @property
    def answers(self) -> int:
        """The tokens that values consist of."""
        return self.vocab_size - 1 - self._keys

    @property
    def shortest(self) -> tuple[int, str]:
        """The longest pair, and again without its last token."""
        return 2 * (self.key_motif + self.value_motif) - 1, "2 * (key_motif + value_motif) - 1"

    def generate(self, seq_len: int, count: int, generator: Generator, facts_seed: int) -> Examples:
        """Pairs from the end of the sequence back, then padding."""
        longest, total = self.key_motif + self.value_motif, seq_len + 1
        pairs = (total - longest) // 2  # as many as may come before the last one
        drawn = (count, pairs)
        key_sizes = torch.randint(1, self.key_motif + 1, drawn, generator=generator)
        value_sizes = torch.randint(1, self.value_motif + 1, drawn, generator=generator)
        keys = _distinct(self._keys, (*drawn, self.key_motif), generator)
        values = self._keys + _distinct(self.answers, (*drawn, self.value_motif), generator)

        # A number for each key: its tokens are the digits, from 1 on.
        places = torch.arange(self.key_motif)
        digits = torch.where(places < key_sizes[..., None], keys + 1, 0)
        first = _first_alike((digits * (self._keys + 1) ** places).sum(-1))
        before = (key_sizes + value_sizes.gather(1, first)).cumsum(1) <= total - longest
        last = before.sum(1, keepdim=True)  # (B, 1) the number of the last pair, a repeated one
        again = (last * torch.rand(count, 1, dtype=torch.float64, generator=generator)).long()
        number = torch.arange(pairs + 1)
        source = number.clamp(max=pairs - 1).repeat(count, 1).scatter_(1, last, again)
        told = first.gather(1, source)  # (B, pairs + 1) the pair that first had this key
        asked = told < number

        key_sizes, value_sizes = key_sizes.gather(1, source), value_sizes.gather(1, told)
        lengths = torch.where(number <= last, key_sizes + value_sizes, 0)
        ends = lengths.cumsum(1)
        starts = total - ends[:, -1:] + ends - lengths
        rows = torch.arange(count)[:, None]
        targets = torch.full((count, total), IGNORE)
        inputs = torch.full_like(targets, self.vocab_size - 1)
        for tokens, sizes, starts_at, answered in (
            (keys[rows, source], key_sizes, starts, torch.zeros_like(asked)),
            (values[rows, told], value_sizes, starts + key_sizes, asked),
        ):
            place = torch.arange(tokens.shape[-1])
            written = (place < sizes[..., None]) & (number <= last)[..., None]
            row, pair, at = written.nonzero(as_tuple=True)
            column = starts_at[row, pair] + at
            inputs[row, column] = tokens[row, pair, at]
            targets[row, column] = torch.where(answered[row, pair], tokens[row, pair, at], IGNORE)
        return Examples(inputs[:, :-1], targets[:, 1:])


def _recall(keys: int, values: int, noisy: Tensor, seq_len: int, generator: Generator) -> Examples:
    """Pairs (B, pairs) of which those not noisy are asked for where their key was seen before."""
    count, pairs = noisy.shape
    drawn = torch.randint(keys, (count, pairs), generator=generator)
    shown = torch.zeros(count, keys + 1)
    shown.scatter_(1, torch.where(noisy, keys, drawn)[:, :-1], 1.0)
    drawn[:, -1:] = torch.multinomial(shown[:, :keys], 1, generator=generator)
    value_of = keys + torch.randint(values, (count, keys), generator=generator)
    told = value_of.gather(1, drawn)
    repeated = _first_alike(torch.where(noisy, keys, drawn)) < torch.arange(pairs)
    inputs = torch.stack([drawn, told], 2).flatten(1)
    targets = torch.full_like(inputs, IGNORE)
    targets[:, ::2] = torch.where(repeated & ~noisy, told, IGNORE)
    return Examples(inputs[:, :seq_len], targets[:, :seq_len])


def _distinct(n: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Of the numbers below n, different ones along the last dimension."""
    drawn = torch.empty(*shape[:-1], 0, dtype=torch.int64)
    for taken in range(shape[-1]):
        ranks = torch.randint(n - taken, (*shape[:-1], 1), generator=generator)
        drawn = torch.cat([drawn, _without(drawn, ranks)], -1)
    return drawn


def _without(taken: Tensor, ranks: Tensor) -> Tensor:
    """The numbers with these ranks among those that are not taken (different along the last)."""
    free_below = taken.sort(-1).values - torch.arange(taken.shape[-1])
    return ranks + torch.searchsorted(free_below, ranks, right=True)


def _first_alike(numbers: Tensor) -> Tensor:
    """(B, N) where in its row each number stands first."""
    alike, order = numbers.sort(dim=1, stable=True)
    place = torch.arange(numbers.shape[1]).expand_as(order)
    begins = torch.ones_like(alike, dtype=torch.bool)
    begins[:, 1:] = alike[:, 1:] != alike[:, :-1]
    begin = torch.where(begins, place, 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, begin))
