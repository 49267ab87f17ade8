"""A language model: embedding, a stack of blocks, a norm and a head.

Any mixture of architectures stacks, since all blocks follow one contract. Letters: B batch,
T tokens, D width, V vocabulary.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from archs.block import Block, decode_bytes, forward_flops, state_bytes

MAX_DEPTH = 4096  # blocks in a pattern


class ModelState(NamedTuple):
    """The states of all blocks."""

    blocks: tuple[Any, ...]
    position: int = 0  # tokens consumed so far


class ModelOutput(NamedTuple):
    """Logits, and the state exactly when one was asked for."""

    logits: Tensor  # (B, T, V) from forward, (B, V) from prefill and decode
    state: ModelState | None = None


def expand_pattern(pattern: str, depth: int | None = None) -> list[str]:
    """The architecture of each block: "mamba2*3+transformer" is three and one, repeated to depth.

    Raises:
        ValueError: the pattern is malformed or longer than MAX_DEPTH, or its length does not
            divide `depth`.
    """
    names: list[str] = []
    for part in pattern.split("+"):
        match = re.fullmatch(r"\s*([^\s*]+)\s*(?:\*\s*([1-9]\d*))?\s*", part)
        if match is None:
            raise ValueError(
                f"cannot read the pattern {pattern!r}: write it as mamba2*3+transformer"
            )
        count = int(match[2] or 1)
        if len(names) + count > MAX_DEPTH:
            raise ValueError(f"the pattern {pattern[:80]!r} has more than {MAX_DEPTH} blocks")
        names += [match[1]] * count
    if depth is None:
        return names
    if depth < 1 or depth % len(names):
        raise ValueError(
            f"depth {depth} is not a multiple of the pattern {pattern!r}, which has {len(names)}"
        )
    return names * (depth // len(names))


def canonical_pattern(pattern: str) -> str:
    """The one way to write a pattern: " a+ a*2 +b" is "a*3+b".

    Raises:
        ValueError: as `expand_pattern`.
    """
    groups = ((name, len(list(group))) for name, group in groupby(expand_pattern(pattern)))
    return "+".join(name if count == 1 else f"{name}*{count}" for name, count in groups)


class LanguageModel(nn.Module):
    """Embedding (V, D), blocks, the last block's kind of norm, head (D, V) without bias."""

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        width: int,
        vocab_size: int = 256,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = blocks[-1].final_norm()
        self.head = nn.Linear(width, vocab_size, bias=False)
        blocks[0].init_ends(self.embedding, self.head)
        if tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: ModelState | None = None) -> ModelOutput:
        """Logits of every position.

        Args:
            tokens: (B, T) integers.
            state: continue from here; it is consumed.
        """
        x, state = self._hidden(tokens, state)
        return ModelOutput(self.head(self.norm(x)), state)

    def features(self, tokens: Tensor) -> Tensor:
        """What the head reads, (B, T, D), of tokens (B, T)."""
        return self.norm(self._hidden(tokens, None)[0])

    def prefill(self, tokens: Tensor, max_len: int) -> ModelOutput:
        """Read a prompt (B, T) into a fresh state with room for `max_len` tokens."""
        x, state = self._hidden(tokens, self.init_state(len(tokens), max_len))
        return ModelOutput(self.head(self.norm(x[:, -1])), state)

    def decode(self, token: Tensor, state: ModelState) -> ModelOutput:
        """Read one token (B,) and return the logits (B, V) of the next."""
        x, carry, blocks = self.embedding(token), None, []
        for block, block_state in zip(self._stack(), state.blocks, strict=True):
            x, block_state, carry = block.step(x, block_state, carry)
            blocks.append(block_state)
        state = ModelState(tuple(blocks), state.position + 1)
        return ModelOutput(self.head(self.norm(x)), state)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        new_tokens: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts (B, T) by `new_tokens`; temperature 0 takes the likeliest token.

        Returns:
            (B, T + new_tokens) integers.
        """
        logits, state = self.prefill(tokens, tokens.shape[1] + new_tokens)
        out = [tokens]
        for index in range(new_tokens):
            if temperature > 0:
                weights = torch.softmax(logits.float() / temperature, dim=-1)
                token = torch.multinomial(weights, 1, generator=generator)[:, 0]
            else:
                token = logits.argmax(dim=-1)
            out.append(token[:, None])
            if index + 1 < new_tokens:
                assert state is not None
                logits, state = self.decode(token, state)
        return torch.cat(out, dim=1)

    def init_state(
        self,
        batch: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelState:
        """The state before the first token; device and type default to the embedding's."""
        weight = self.embedding.weight
        return ModelState(
            tuple(
                block.init_state(
                    batch, max_len, device=device or weight.device, dtype=dtype or weight.dtype
                )
                for block in self._stack()
            )
        )

    def parameter_count(self) -> int:
        """Number of parameters, a tied weight counted once."""
        return sum(p.numel() for p in self.parameters())

    def forward_flops(self, batch: int, new_tokens: int, context: int = 0) -> int:
        """Forward FLOPs: blocks and head; embedding, norms and element-wise work excluded."""
        head = 2 * batch * new_tokens * self.head.weight.numel()
        return head + sum(forward_flops(b, batch, new_tokens, context) for b in self._stack())

    def state_bytes(self, batch: int, max_len: int) -> int:
        """Bytes of the state that holds `max_len` tokens."""
        dtype = self.embedding.weight.dtype
        return sum(state_bytes(block, batch, max_len, dtype) for block in self._stack())

    def decode_bytes(self, batch: int, position: int) -> int:
        """Bytes a decode step at `position` must move: weights once and state once."""
        weight = self.head.weight
        ends = (weight.numel() + batch * weight.shape[1]) * weight.element_size()
        return ends + sum(
            decode_bytes(block, batch, position, weight.dtype) for block in self._stack()
        )

    def _hidden(self, tokens: Tensor, state: ModelState | None) -> tuple[Tensor, ModelState | None]:
        """Run the blocks over tokens (B, T); activations (B, T, D) before the last norm."""
        x, carry, blocks = self.embedding(tokens), None, []
        for index, block in enumerate(self.blocks):
            x, block_state, carry = block(x, state.blocks[index] if state else None, carry)
            blocks.append(block_state)
        if state is None:
            return x, None
        return x, ModelState(tuple(blocks), state.position + tokens.shape[1])

    def _stack(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]
