"""Synthetic tasks of recall and state tracking: random sequences, and what is asked of each.

A model answers as a language model does, from what it has read up to and including a position. What
is asked there follows from the inputs so far (of memorisation: and from the facts, which are the
same in all sequences; of compression: see there).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Generator

from harness.recall_tasks import (
    IGNORE,
    MQAR,
    Examples,
    FuzzyRecall,
    InContextRecall,
    NoisyRecall,
    Task,
)
from harness.sweep import unknown


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """Tokens among blanks, to be repeated in their order after a sign to do so.

    MAD, as `InContextRecall`. Each blank stands before a token that is drawn for it, so that none
    comes between the last token and the sign; a blank for each token follows the sign, and at these
    they are asked for. Tokens: those to be copied, the blank, the sign.

    Differs: nothing.
    """

    tokens: int = 16

    def __post_init__(self) -> None:
        self._at_least(tokens=1, vocab_size=4)

    @property
    def answers(self) -> int:
        """The tokens to be copied."""
        return self.vocab_size - 2

    @property
    def shortest(self) -> tuple[int, str]:
        """The tokens twice, the sign, and a blank."""
        return 2 * self.tokens + 2, "2 * tokens + 2"

    def generate(self, seq_len: int, count: int, generator: Generator, facts_seed: int) -> Examples:
        """Tokens and blanks, the sign, blanks."""
        blanks, drawn = seq_len - 2 * self.tokens - 1, (count, self.tokens)
        copied = torch.randint(self.answers, drawn, generator=generator)
        before = torch.randint(self.tokens, (count, blanks), generator=generator)
        ones = torch.ones_like(before)
        gaps = torch.zeros_like(copied).scatter_add_(1, before, ones)
        inputs = torch.full((count, seq_len), self.vocab_size - 2)
        inputs.scatter_(1, torch.arange(self.tokens) + gaps.cumsum(1), copied)
        inputs[:, -self.tokens - 1] = self.vocab_size - 1
        targets = torch.full_like(inputs, IGNORE)
        targets[:, -self.tokens :] = copied
        return Examples(inputs, targets)


@dataclass(frozen=True, kw_only=True)
class Compression(Task):
    """T - 1 random tokens and a sign, at which the model's output must hold all of them.

    MAD, as `InContextRecall`. The targets are the inputs, each at its own position, but they are
    asked of the output at the *last* position alone: `decoder` "position-mlp" stands for an MLP
    that sees that output plus an embedding of the position whose token it is to tell. Asking the
    model's output at each position would be no task. Tokens: those to be compressed, the sign.

    Differs: MAD also asks for the sign, which is always the same; here it is not counted.
    """

    decoder: ClassVar[str] = "position-mlp"

    def __post_init__(self) -> None:
        self._at_least(vocab_size=3)

    @property
    def answers(self) -> int:
        """The tokens to be compressed."""
        return self.vocab_size - 1

    @property
    def shortest(self) -> tuple[int, str]:
        """A token and the sign."""
        return 2, ""

    def generate(self, seq_len: int, count: int, generator: Generator, facts_seed: int) -> Examples:
        """Tokens and the sign."""
        inputs = torch.randint(self.answers, (count, seq_len), generator=generator)
        targets = inputs.clone()
        inputs[:, -1], targets[:, -1] = self.vocab_size - 1, IGNORE
        return Examples(inputs, targets)


@dataclass(frozen=True, kw_only=True)
class Memorisation(Task):
    """Keys, each followed by a sign, at which its value is asked for: a fact, never shown.

    MAD, as `InContextRecall`. The facts give every key a value of its own; they come from
    `facts_seed` and are the same in all sequences. Tokens: keys, values, the sign.

    Differs: T may be odd; the last key is then not asked for.
    """

    vocab_size: int = 256

    def __post_init__(self) -> None:
        self._at_least(vocab_size=5)

    @property
    def answers(self) -> int:
        """The values that are some key's."""
        return (self.vocab_size - 1) // 2  # one a key, though there may be a value more

    @property
    def shortest(self) -> tuple[int, str]:
        """A key and the sign."""
        return 2, ""

    def generate(self, seq_len: int, count: int, generator: Generator, facts_seed: int) -> Examples:
        """Keys and signs in turn."""
        keys = self.answers
        shuffled = torch.randperm(
            self.vocab_size - 1 - keys, generator=Generator().manual_seed(facts_seed)
        )
        drawn = torch.randint(keys, (count, (seq_len + 1) // 2), generator=generator)
        inputs = torch.full((count, seq_len), self.vocab_size - 1)
        inputs[:, ::2] = drawn
        targets = torch.full_like(inputs, IGNORE)
        targets[:, 1::2] = (keys + shuffled)[drawn[:, : seq_len // 2]]
        return Examples(inputs, targets)


@dataclass(frozen=True, kw_only=True)
class InductionHeads(Task):
    """A special token somewhere in a random sequence and at its end: what followed the first?

    Gu and Dao 2023, "Mamba", arXiv 2312.00752, section 4.1.2. Tokens: the others, the special one.

    Differs: nothing that the paper states. What it leaves open: here the special token counts among
    the 16, and first stands anywhere that leaves room for the token after it.
    """

    def __post_init__(self) -> None:
        self._at_least(vocab_size=3)

    @property
    def answers(self) -> int:
        """All tokens but the special one."""
        return self.vocab_size - 1

    @property
    def shortest(self) -> tuple[int, str]:
        """The special token, what follows it, and the end."""
        return 3, ""

    def generate(self, seq_len: int, count: int, generator: Generator, facts_seed: int) -> Examples:
        """Tokens with the special one twice."""
        inputs = torch.randint(self.answers, (count, seq_len), generator=generator)
        at = torch.randint(seq_len - 2, (count, 1), generator=generator)
        targets = torch.full_like(inputs, IGNORE)
        targets[:, -1:] = inputs.gather(1, at + 1)
        inputs.scatter_(1, at, self.answers)
        inputs[:, -1] = self.answers
        return Examples(inputs, targets)


@dataclass(frozen=True, kw_only=True)
class Parity(Task):
    """Random bits; at each, whether the number of ones so far is odd.

    Grazzi et al. 2024, arXiv 2411.12537; Merrill et al. 2024, arXiv 2404.08819, who ask for the
    state after every token. Tokens: 0 and 1, which are the answers too.

    Differs: Grazzi et al. draw the length of each sequence and ask at its end only.
    """

    vocab_size: int = field(default=2, init=False)

    @property
    def answers(self) -> int:
        """Even and odd."""
        return 2

    @property
    def shortest(self) -> tuple[int, str]:
        """A bit."""
        return 1, ""

    def generate(self, seq_len: int, count: int, generator: Generator, facts_seed: int) -> Examples:
        """Bits."""
        bits = torch.randint(2, (count, seq_len), generator=generator)
        return Examples(bits, bits.cumsum(1) % 2)


TASKS: dict[str, type[Task]] = {
    "mqar": MQAR,
    "in-context-recall": InContextRecall,
    "fuzzy-recall": FuzzyRecall,
    "noisy-recall": NoisyRecall,
    "selective-copying": SelectiveCopying,
    "compression": Compression,
    "memorisation": Memorisation,
    "induction-heads": InductionHeads,
    "parity": Parity,
}


def examples(
    task: str,
    seq_len: int,
    count: int,
    generator: Generator,
    settings: Mapping[str, Any],
    facts_seed: int = 0,
) -> Examples:
    """Draw `count` sequences of T = `seq_len` tokens, the same from the same generator state.

    Args:
        task: a name in `TASKS`.
        seq_len: T.
        count: B.
        generator: on the CPU, where the examples are made.
        settings: fields of the task that are not to have their defaults.
        facts_seed: of what memorisation asks for; no other task has facts.

    Raises:
        ValueError: as `checked`; or `count` below 1.
    """
    whole = checked(task, seq_len, settings)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    return TASKS[task](**whole).generate(seq_len, count, generator, facts_seed)


def checked(task: str, seq_len: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a task, defaults filled in.

    Raises:
        ValueError: an unknown task or setting, a value of the wrong type or out of range, or too
            short a T.
    """
    made = _made(task, settings)
    shortest, formula = made.shortest
    if not isinstance(seq_len, int) or isinstance(seq_len, bool) or seq_len < shortest:
        bound = f"{formula} = {shortest}" if formula else shortest
        raise ValueError(f"{task}: seq_len must be a whole number >= {bound}, got {seq_len!r}")
    return {name: getattr(made, name) for name in _defaults(type(made))}


def vocab_size(task: str, settings: Mapping[str, Any]) -> int:
    """Tokens that a model of the task needs, special ones included.

    Raises:
        ValueError: as `checked`.
    """
    return _made(task, settings).vocab_size


def chance(task: str, settings: Mapping[str, Any]) -> float:
    """Accuracy of always giving the same answer, the best without having read the sequence.

    Raises:
        ValueError: as `checked`.
    """
    return 1 / _made(task, settings).answers


def _made(task: str, settings: Mapping[str, Any]) -> Task:
    if task not in TASKS:
        raise ValueError(unknown("task", task, TASKS))
    defaults = _defaults(TASKS[task])
    for name in settings:
        if not defaults:
            raise ValueError(f"{task} has no settings: leave out {name!r}")
        if name not in defaults:
            raise ValueError(f"{task}: {unknown('setting', name, defaults)}")
    try:
        return TASKS[task](
            **{name: _typed(name, value, defaults[name]) for name, value in settings.items()}
        )
    except ValueError as error:
        raise ValueError(f"{task}: {error}") from None


def _defaults(task: type[Task]) -> dict[str, Any]:
    return {one.name: one.default for one in fields(task) if one.init}


def _typed(name: str, value: Any, default: Any) -> Any:
    """The value, of the type of the setting's default."""
    kind = type(default)
    if isinstance(value, bool) == (kind is bool):
        if isinstance(value, kind):
            return value
        if kind is float and isinstance(value, int):
            return float(value)
    what = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
    raise ValueError(f"{name} must be {what}, got {value!r}")
