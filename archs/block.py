"""The contract: one residual block, run over a sequence or one token at a time, and its accounting.

Letters: B batch, T tokens, D width. Accounting is derived from the block itself: state bytes from
`init_state` on the meta device, parameter bytes from the parameters, FLOPs from the linear layers
and the closed form of the mixer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from archs.ops import Backend

Carry = dict[str, Tensor]


class State(Protocol):
    """What a block remembers of the tokens so far: a NamedTuple of tensors and a position."""

    position: int  # tokens consumed so far

    def _replace(self, **changes: Any) -> Self: ...


class BlockOutput(NamedTuple):
    """What a block returns: activations, and the state exactly when one was passed in."""

    x: Tensor  # (B, T, D) from forward, (B, D) from step
    state: Any | None = None
    carry: Carry | None = None  # for later blocks within this call, keyed by architecture


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What every architecture is told; each adds fields of its own."""

    width: int  # D
    max_len: int = 2048  # longest sequence; only Hyena's filter depends on it
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width < 1 or self.max_len < 1:
            raise ValueError(
                f"width and max_len must be positive, got {self.width} and {self.max_len}"
            )


class Block(nn.Module, ABC):
    """One residual layer, drawn as its paper draws it.

    The step is the definition: `forward` over T tokens equals folding `step` over them, split
    anywhere. A state passed in is consumed: buffers in it may be written in place (never where
    gradients are recorded).

    Args:
        config: an instance of the class's `Config`.
        layer_index: place of this block in the stack, from 0.
        depth: number of blocks in the stack.
        kind_index: place among the stack's blocks of the same architecture; default `layer_index`.
        backend: which implementation of the operations runs; a plain attribute.

    Attributes:
        operation: the sequence operation of `archs.ops` that `forward` calls, in blocks that call
            one; a plain attribute, so that another function with its signature can stand in for it.
    """

    Config: ClassVar[type[BlockConfig]]
    has_kernels: ClassVar[bool] = False  # Triton ones: backend "auto" is then "triton" on a GPU
    operation: Callable[..., Any]

    def __init__(
        self,
        config: BlockConfig,
        *,
        layer_index: int = 0,
        depth: int = 1,
        kind_index: int | None = None,
        backend: Backend = "torch",
    ) -> None:
        super().__init__()
        if not 0 <= layer_index < depth:
            raise ValueError(f"layer_index {layer_index} is outside a stack of depth {depth}")
        self.layer_index = layer_index
        self.depth = depth
        self.kind_index = layer_index if kind_index is None else kind_index
        self.backend: Backend = backend

    @abstractmethod
    def forward(
        self, x: Tensor, state: Any | None = None, carry: Carry | None = None
    ) -> BlockOutput:
        """Run T >= 1 tokens x (B, T, D), continuing from `state` if one is given."""

    @abstractmethod
    def step(self, x: Tensor, state: Any, carry: Carry | None = None) -> BlockOutput:
        """Run one token x (B, D) from `state`."""

    @abstractmethod
    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> Any:
        """The state before the first token, with room for `max_len` tokens of type `dtype`."""

    @abstractmethod
    def mixer_flops(self, new_tokens: int, context: int = 0) -> int:
        """Forward FLOPs of the sequence mixer for one sequence, projections excluded.

        A multiply-add counts 2. `context` is the number of tokens already in the state.
        """

    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The normalisation this architecture puts between its last block and the head."""

    def shared_flops(self, new_tokens: int, context: int = 0) -> int:
        """Forward FLOPs once a call, whatever the batch (Hyena's implicit filter)."""
        return 0

    def projections(self) -> Iterator[nn.Linear]:
        """The linear layers applied once to every token."""
        return (module for module in self.modules() if isinstance(module, nn.Linear))

    def step_weight_bytes(self, position: int) -> int:
        """Bytes of weights that a decode step at `position` reads."""
        return parameter_bytes(self)

    def step_state_bytes(self, batch: int, position: int, dtype: torch.dtype) -> int:
        """Bytes of state that a decode step at `position` moves: all of it, its own token's too."""
        return state_bytes(self, batch, position + 1, dtype)

    def init_ends(self, embedding: nn.Embedding, head: nn.Linear) -> None:
        """Initialise a model's embedding and head the way this architecture's code does."""
        nn.init.normal_(embedding.weight, std=0.02)
        nn.init.normal_(head.weight, std=0.02)


def recurrent_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a recurrent state is kept in for inputs of `dtype`: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of all parameters, each counted once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def tensor_bytes(state: Any) -> int:
    """Bytes of all tensors in a state, or in a nested tuple or list of states."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, tuple | list):
        return sum(tensor_bytes(part) for part in state)
    return 0


def state_bytes(block: Block, batch: int, max_len: int, dtype: torch.dtype) -> int:
    """Bytes of the state that holds `max_len` tokens, from `init_state` on the meta device."""
    return tensor_bytes(block.init_state(batch, max_len, device="meta", dtype=dtype))


def projection_flops(block: Block, new_tokens: int) -> int:
    """Forward FLOPs of the linear layers over `new_tokens` tokens."""
    return 2 * new_tokens * sum(layer.weight.numel() for layer in block.projections())


def forward_flops(block: Block, batch: int, new_tokens: int, context: int = 0) -> int:
    """Forward FLOPs of a block: projections and mixer; norms and element-wise work excluded."""
    one_sequence = projection_flops(block, new_tokens) + block.mixer_flops(new_tokens, context)
    return batch * one_sequence + block.shared_flops(new_tokens, context)


def train_flops(forward: int) -> int:
    """FLOPs of a training step: the backward pass costs twice the forward pass."""
    return 3 * forward


def decode_bytes(block: Block, batch: int, position: int, dtype: torch.dtype) -> int:
    """Bytes a decode step at `position` must move: its weights once and its state once."""
    state = block.step_state_bytes(batch, position, dtype)
    return block.step_weight_bytes(position) + state
