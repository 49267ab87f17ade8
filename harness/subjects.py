"""A block and a model under one interface: what is timed, and the copy that it is checked against.

Letters: B batch, T tokens, D width, V vocabulary.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.block import Block
from archs.model import LanguageModel
from archs.ops import Backend
from harness import peers


@dataclass(frozen=True, kw_only=True)
class Subject(ABC):
    """A module with the inputs that it is timed on."""

    module: Any
    inputs: Tensor  # (B, T, D), or tokens (B, T); T = 1 for decode
    following: Tensor  # (B, D), or (B,): the token after them
    target: Tensor  # what `objective` takes: a cotangent like y, or the tokens to predict

    @abstractmethod
    def init_state(self, batch: int, max_len: int, device: str | None = None) -> Any:
        """An empty state with room for `max_len` tokens, on the module's device or another."""

    @abstractmethod
    def forward(self) -> Tensor:
        """Outputs of all tokens."""

    @abstractmethod
    def prefill(self, max_len: int) -> tuple[Tensor, Any]:
        """Outputs of the inputs read into a fresh state, and that state."""

    @abstractmethod
    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Outputs (B, ...) of one token, and the next state."""

    @abstractmethod
    def objective(self, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is differentiated, and the gradient that it starts from (None: it is a scalar)."""

    @abstractmethod
    def leaf(self) -> Tensor:
        """The tensor whose gradient has passed everything else."""

    @abstractmethod
    def blocks(self) -> Sequence[Block]:
        """The blocks in it."""

    def parameters(self) -> list[nn.Parameter]:
        """All parameters."""
        return list(self.module.parameters())

    def last_row(self, tokens: int | None = None) -> Self:
        """The same with its last batch row alone, and of that the first tokens."""
        return replace(
            self,
            inputs=self.inputs[-1:, :tokens],
            following=self.following[-1:],
            target=self.target[-1:, :tokens],
        )

    def in_float64(self, tokens: int | None, backend: Backend = "reference") -> Self:
        """A copy in float64, on another backend, with the last row's first tokens.

        Its operations are ours, also where a peer stands in for one.
        """
        part = self.last_row(tokens)
        part = replace(
            part,
            module=copy.deepcopy(self.module).double(),
            **{name: detached(getattr(part, name)) for name in ("inputs", "following", "target")},
        )
        for block in part.blocks():
            block.backend = backend
        peers.restore(part.blocks())
        return part

    def fold(self, *, and_following: bool = False) -> Tensor:
        """Outputs (B, T, ...) by folding the step: the definition."""
        tokens = list(self.inputs.unbind(1)) + [self.following] * and_following
        state, ys = self.init_state(len(self.inputs), len(tokens)), []
        for token in tokens:
            y, state = self.step(token, state)
            ys.append(y)
        return torch.stack(ys, 1)


class BlockSubject(Subject):
    """One block; the gradient that enters its outputs is random."""

    module: Block

    def init_state(self, batch: int, max_len: int, device: str | None = None) -> Any:
        """The block's."""
        return self.module.init_state(
            batch, max_len, device=device or self.inputs.device, dtype=self.inputs.dtype
        )

    def forward(self) -> Tensor:
        """(B, T, D)."""
        return self.module(self.inputs).x

    def prefill(self, max_len: int) -> tuple[Tensor, Any]:
        """(B, T, D) and the state."""
        output = self.module(self.inputs, self.init_state(len(self.inputs), max_len))
        return output.x, output.state

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(B, D) and the state."""
        output = self.module.step(token, state)
        return output.x, output.state

    def objective(self, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The outputs against the cotangent."""
        return outputs, self.target

    def leaf(self) -> Tensor:
        """The inputs."""
        return self.inputs

    def blocks(self) -> Sequence[Block]:
        """Itself."""
        return [self.module]


class ModelSubject(Subject):
    """A language model; its loss is the cross-entropy of random tokens."""

    module: LanguageModel

    def init_state(self, batch: int, max_len: int, device: str | None = None) -> Any:
        """The states of all blocks."""
        return self.module.init_state(batch, max_len, device=device)

    def forward(self) -> Tensor:
        """Logits (B, T, V)."""
        return self.module(self.inputs).logits

    def prefill(self, max_len: int) -> tuple[Tensor, Any]:
        """Logits (B, V) after the last token, and the state."""
        output = self.module.prefill(self.inputs, max_len)
        return output.logits, output.state

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits (B, V) and the state."""
        output = self.module.decode(token, state)
        return output.logits, output.state

    def objective(self, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mean cross-entropy."""
        return F.cross_entropy(outputs.flatten(0, 1), self.target.flatten()), None

    def leaf(self) -> Tensor:
        """The embedding's weight: tokens have no gradient."""
        return self.module.embedding.weight

    def blocks(self) -> Sequence[Block]:
        """The stack."""
        return [block for block in self.module.blocks if isinstance(block, Block)]


def detached(x: Tensor) -> Tensor:
    """A copy in float64 without its graph; tokens stay integers."""
    x = x.detach()
    return x.double() if x.is_floating_point() else x.clone()
