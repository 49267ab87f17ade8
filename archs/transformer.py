"""A pre-norm Transformer block of Llama's form: rotary grouped-query attention, then SwiGLU.

Touvron et al. 2023, "Llama 2" (arXiv 2307.09288, section 2.2), after Vaswani et al. 2017 (arXiv
1706.03762). Parts: rotary embedding, Su et al. 2021 (arXiv 2104.09864, section 3.2.2); SwiGLU,
Shazeer 2020 (arXiv 2002.05202, section 2); grouped queries, Ainslie et al. 2023 (arXiv 2305.13245);
RMSNorm, Zhang and Sennrich 2019 (arXiv 1910.07467); the sliding window is that of Mistral 7B, Jiang
et al. 2023 (arXiv 2310.06825, section 2).

For the token x_p at position p, with n = RMSNorm(x_p), the state (k_0, v_0), ..., (k_p, v_p):

    q_p, k_p = R_p Wq n, R_p Wk n      rotated by p in K/2 planes; v_p = Wv n
    x_p += Wo sum_j softmax_j(q_p . k_j / sqrt(K)) v_j      over j <= p, in a window w: p - w < j
    x_p += Wdown(silu(Wgate n') * Wup n'),  n' = RMSNorm(x_p)

Letters: B batch, T tokens, D width, H query heads, H_kv key/value heads, K head size, F MLP width,
S keys.

Differs from the paper:
- initialisation: Llama's is not published. Weights are normal with deviation 0.02, those of the two
  projections into the residual stream divided by sqrt(2 depth), as in GPT-2 and Megatron-LM (arXiv
  1909.08053, section 4);
- rotated planes pair channel i with i + K/2, as in the `transformers` library; Meta's code pairs
  neighbours. The two differ by an order of the rows of Wq and Wk;
- rotation angles are formed in float64 (Llama: float32).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from archs.block import Block, BlockConfig, BlockOutput, Carry
from archs.layers import RMSNorm
from archs.ops import Backend
from archs.ops.attention import attention


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(BlockConfig):
    """Sizes of a Transformer block; defaults are Llama's, at head size 64."""

    head_dim: int = 64  # K
    kv_heads: int | None = None  # H_kv; None means as many as query heads
    window: int | None = None  # w; None reads the whole past
    rope_base: float = 10000.0
    mlp_width: int | None = None  # F; None means 8/3 D, rounded up as Llama does

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even and positive, as RoPE turns pairs, got {self.head_dim}"
            )
        if self.width % self.head_dim:
            raise ValueError(
                f"width must be a multiple of head_dim, got {self.width} and {self.head_dim}"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(
                f"kv_heads must divide the {self.heads} heads (width / head_dim), "
                f"got {self.kv_heads}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, or None for no window, got {self.window}")
        if self.rope_base <= 0:
            raise ValueError(f"rope_base must be positive, got {self.rope_base}")
        if self.mlp_width is not None and self.mlp_width < 1:
            raise ValueError(f"mlp_width must be at least 1, got {self.mlp_width}")

    @property
    def heads(self) -> int:
        """Query heads, H."""
        return self.width // self.head_dim

    @property
    def key_value_heads(self) -> int:
        """Key and value heads, H_kv."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden_width(self) -> int:
        """MLP width F: by default 8/3 D rounded up to Llama's multiple_of, 256."""
        if self.mlp_width is not None:
            return self.mlp_width
        return math.ceil(int(8 * self.width / 3) / 256) * 256


class TransformerState(NamedTuple):
    """Keys, after rotation, and values of the tokens that later ones can read.

    Without a window, token p lies in slot p. With one, the slots are a ring: token p lies in slot
    p % capacity. A state passed in is consumed: stepping an old one again overwrites the same slot.
    """

    keys: Tensor  # (B, capacity, H_kv, K)
    values: Tensor  # (B, capacity, H_kv, K)
    position: int  # tokens consumed so far


class GatedMLP(nn.Module):
    """SwiGLU without biases: down(silu(gate(x)) * up(x)), (..., D) to (..., D)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden_width, bias=False)
        self.up = nn.Linear(width, hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., D)."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class TransformerBlock(Block):
    """One pre-norm layer: attention, then SwiGLU, each added to the residual stream."""

    Config: ClassVar[type[BlockConfig]] = TransformerConfig
    has_kernels: ClassVar[bool] = True

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layer_index: int = 0,
        depth: int = 1,
        kind_index: int | None = None,
        backend: Backend = "torch",
    ) -> None:
        super().__init__(
            config, layer_index=layer_index, depth=depth, kind_index=kind_index, backend=backend
        )
        self.config = config
        self.operation = attention
        width, kv_width = config.width, config.key_value_heads * config.head_dim
        self.attention_norm = RMSNorm(width, config.norm_eps)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_width, bias=False)
        self.value = nn.Linear(width, kv_width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = RMSNorm(width, config.norm_eps)
        self.mlp = GatedMLP(width, config.hidden_width)
        for layer in self.projections():
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.output, self.mlp.down):
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * depth))

    def forward(
        self, x: Tensor, state: TransformerState | None = None, carry: Carry | None = None
    ) -> BlockOutput:
        """Run T >= 1 tokens x (B, T, D), continuing from `state` if one is given.

        Raises:
            ValueError: the state has no room for T more tokens.
        """
        per_head = (-1, self.config.head_dim)
        normed = self.attention_norm(x)
        q = self.query(normed).unflatten(-1, per_head)  # (B, T, H, K)
        k = self.key(normed).unflatten(-1, per_head)  # (B, T, H_kv, K)
        v = self.value(normed).unflatten(-1, per_head)  # (B, T, H_kv, K)
        start = 0 if state is None else state.position
        cos, sin = rotations(start, q, self.config.rope_base)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if state is None:
            y = self.operation(q, k, v, window=self.config.window, backend=self.backend)
        else:
            y, state = self._attend(q, k, v, state)
        x = x + self.output(y.flatten(-2))
        return BlockOutput(x + self.mlp(self.mlp_norm(x)), state, carry)

    def step(self, x: Tensor, state: TransformerState, carry: Carry | None = None) -> BlockOutput:
        """Run one token x (B, D): `forward` at T = 1, which reads the cache where it lies."""
        output = self.forward(x.unsqueeze(1), state, carry)
        return output._replace(x=output.x.squeeze(1))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: TransformerState
    ) -> tuple[Tensor, TransformerState]:
        """Attention of T new tokens to the cache and themselves; y, and the cache with them."""
        window, position = self.config.window, state.position
        T, capacity = q.shape[1], state.keys.shape[1]
        end = position + T
        if end > capacity and (window is None or capacity < window):
            raise ValueError(
                f"the state has room for {capacity} tokens, not {end}: "
                f"call init_state with max_len of at least {end}"
            )
        # A cache that a recorded graph reads is copied, not written.
        recorded = torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v))
        in_place = not (recorded or state.keys.requires_grad or state.values.requires_grad)
        overrun = T > 1 and end > capacity
        if overrun:
            # The ring drops keys that the earlier of these queries read: take them out first.
            oldest = max(0, position - capacity + 1)
            slots = torch.arange(oldest, position, device=q.device) % capacity
            seen_k = torch.cat([state.keys[:, slots], k], 1)
            seen_v = torch.cat([state.values[:, slots], v], 1)
        keys = write_ring(state.keys, k, position, in_place=in_place)
        values = write_ring(state.values, v, position, in_place=in_place)
        if not overrun:
            # All that the ring holds is visible; once full it is out of order, which a single
            # query cannot tell.
            held = min(end, capacity)
            seen_k, seen_v = keys[:, :held], values[:, :held]
        y = self.operation(q, seen_k, seen_v, window=window, backend=self.backend)
        return y, TransformerState(keys, values, end)

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> TransformerState:
        """An empty cache: max_len slots, or with a window at most as many as it is wide."""
        window = self.config.window
        capacity = max_len if window is None else min(max_len, window)
        shape = (batch, capacity, self.config.key_value_heads, self.config.head_dim)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return TransformerState(keys, values, 0)

    def mixer_flops(self, new_tokens: int, context: int = 0) -> int:
        """FLOPs of the scores and the weighted sums: 4 H K for each pair of a query and a key read.

        The query at position p reads min(p + 1, window) keys. Rotation and softmax are not counted.
        """

        def pairs(tokens: int) -> int:
            ramp = tokens if self.config.window is None else min(tokens, self.config.window)
            return ramp * (ramp + 1) // 2 + (tokens - ramp) * ramp

        heads = self.config.heads
        return 4 * heads * self.config.head_dim * (pairs(context + new_tokens) - pairs(context))

    def final_norm(self) -> nn.Module:
        """Llama's: an RMSNorm."""
        return RMSNorm(self.config.width, self.config.norm_eps)


def rotations(start: int, q: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, 1, K/2) of the angles p base^(-2i/K) for q (B, T, H, K) from `start`.

    In float32 at least, from float64 angles: float32 angles near position 1e6 err by up to 0.06.
    """
    T, K = q.shape[1], q.shape[3]
    plane = torch.arange(0, K, 2, device=q.device, dtype=torch.float64) / K  # (K/2,)
    position = torch.arange(start, start + T, device=q.device, dtype=torch.float64)
    angles = torch.outer(position, base**-plane).unsqueeze(1)  # (T, 1, K/2)
    compute = torch.promote_types(q.dtype, torch.float32)
    return angles.cos().to(compute), angles.sin().to(compute)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, T, H, K) in the planes (i, i + K/2); same type out."""
    first, second = x.to(cos.dtype).chunk(2, -1)  # (B, T, H, K/2)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x.dtype)


def write_ring(cache: Tensor, new: Tensor, position: int, *, in_place: bool) -> Tensor:
    """Put the last tokens of new (B, T, ...) that fit into cache (B, capacity, ...), from position.

    Token p goes to slot p % capacity.
    """
    capacity, end = cache.shape[1], position + new.shape[1]
    kept = new[:, -capacity:]
    slot = (end - kept.shape[1]) % capacity
    before_end = min(kept.shape[1], capacity - slot)
    cache = cache if in_place else cache.clone()
    cache[:, slot : slot + before_end] = kept[:, :before_end]
    if before_end < kept.shape[1]:
        cache[:, : kept.shape[1] - before_end] = kept[:, before_end:]
    return cache
