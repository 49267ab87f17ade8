"""RWKV-7 "Goose": time mixing by a generalised delta rule, then channel mixing, both token-shifted.

Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv 2503.14456, section 4;
initialisation and rank formulas of the official trainer, RWKV-LM: RWKV-v7/train_temp/src/model.py.

    x_t^m      = x_t + mix_m * (x_{t-1} - x_t)                for each of m = r, w, k, v, a, g
    r, k, v    = W_r x^r, W_k x^k, W_v x^v
    w          = exp(-exp(-1/2) sigmoid(w0 + W_w2 tanh(W_w1 x^w)))
    a          = sigmoid(a0 + W_a2 W_a1 x^a),   g = W_g2 sigmoid(W_g1 x^g)
    v          = v + (v_first - v) * sigmoid(v0 + W_v2 W_v1 x^v)         but in the first such block
    kappa      = normalise(k * k_k) a head,     k = k * (1 + (a - 1) * k_a)
    S_t        = diag(w_t) S_{t-1} - (kappa_t * a_t) (S_{t-1}^T kappa_t)^T + k_t v_t^T
    time mix   = W_o (g * (group_norm(S_t^T r_t) + (r_t . (r_k * k_t)) v_t))
    chan. mix  = W_2 relu(W_1 x^c)^2                                  with a mix of its own
    output     = z + channel_mix(norm(z)),      z = input + time_mix(norm(input))

`input` is normalised first in a stack's first layer. v_first are the values of the first RWKV-7
block of the stack, which later ones find in the carry.

Letters: B batch, T tokens, D width, H = D / N heads, N head dimension.

Differs from the paper: nothing in the mathematics. The default ranks are those of the newest
official trainer: for D = 2048, 128 for w and a, 64 for v, 224 for g, where the published model has
96, 96, 64, 256. The group norm's epsilon is N * norm_eps, the official 64e-5 at N = 64.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.block import Block, BlockConfig, BlockOutput, Carry, recurrent_dtype
from archs.ops import Backend
from archs.ops.wkv7 import log_decay_of, wkv7, wkv7_step, wkv7_step_triton

CARRY = "rwkv7"  # the carry's key of v_first, (B, T, D) in forward and (B, D) in step


@dataclass(frozen=True, kw_only=True)
class RWKV7Config(BlockConfig):
    """Sizes; a rank or width left at None follows from the width as in the official trainer."""

    head_dim: int = 64  # N
    decay_rank: int | None = None  # of w; 2.5 sqrt(D) to a multiple of 32, at least 32
    rate_rank: int | None = None  # of a, the in-context learning rate; 2.5 sqrt(D) likewise
    value_rank: int | None = None  # of the value residual; 1.7 sqrt(D) likewise
    gate_rank: int | None = None  # of g; 5 sqrt(D) likewise
    mlp_width: int | None = None  # of the channel mix; 4 D

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim < 2 or self.width % self.head_dim:
            raise ValueError(
                f"width = {self.width} must be a multiple of head_dim = {self.head_dim}, and that "
                "at least 2: change width or head_dim"
            )
        for name in ("decay_rank", "rate_rank", "value_rank", "gate_rank", "mlp_width"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be positive, or None for its default, got {size}")

    @property
    def heads(self) -> int:
        """H."""
        return self.width // self.head_dim

    def rank_or(self, rank: int | None, factor: float) -> int:
        """`rank`, or its default: factor * sqrt(D), rounded to a multiple of 32, at least 32."""
        return rank or max(32, round(factor * math.sqrt(self.width) / 32) * 32)


class RWKV7State(NamedTuple):
    """What the block remembers: constant in size."""

    time_shift: Tensor  # (B, D), the last token that entered the time mix
    channel_shift: Tensor  # (B, D), the last token that entered the channel mix
    wkv: Tensor  # (B, H, N, N), S
    position: int


class LowRank(nn.Module):
    """A map D -> rank -> D with a bias or none, which starts as that bias."""

    def __init__(self, width: int, rank: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=bias is not None)
        nn.init.zeros_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, gain=0.1 * max(1.0, math.sqrt(rank / width)))
        if bias is not None:
            self.up.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Both factors with nothing between: (..., D) -> (..., D)."""
        return self.up(self.down(x))


class Projected(NamedTuple):
    """What a token gives the recurrence, all (..., H, N), and the gate."""

    r: Tensor
    decay_logits: Tensor  # float32 or float64
    k: Tensor
    v: Tensor
    kappa: Tensor
    rate: Tensor  # a
    gate: Tensor  # (..., D)


class TimeMix(nn.Module):
    """The paper's time mixing: all that surrounds the recurrence."""

    def __init__(
        self, config: RWKV7Config, layer_index: int, depth: int, has_value_residual: bool
    ) -> None:
        super().__init__()
        D, N, H = config.width, config.head_dim, config.heads
        self.head_dim = N
        channel = torch.arange(D, dtype=torch.get_default_dtype())
        linear = channel / (D - 1) - 0.5
        zigzag = (channel % N) / ((N - 1) / 2) - 1  # from -1 to 1 in each head
        zigzag = zigzag * zigzag.abs()
        deepness = layer_index / max(depth - 1, 1)  # 0 in the first layer, 1 in the last
        w0 = 6 * (channel / (D - 1)) ** (1 + deepness**0.3) - 5.5 + 2.5 * zigzag

        shallowness = 1 - layer_index / depth
        self.mix_r = nn.Parameter(shift_mix(D, 0.2 * shallowness))
        self.mix_w = nn.Parameter(shift_mix(D, 0.9 * shallowness))
        self.mix_k = nn.Parameter(shift_mix(D, 0.7 * shallowness))
        self.mix_v = nn.Parameter(shift_mix(D, 0.7 * shallowness))
        self.mix_a = nn.Parameter(shift_mix(D, 0.9 * shallowness))
        self.mix_g = nn.Parameter(shift_mix(D, 0.2 * shallowness))

        self.receptance = nn.Linear(D, D, bias=False)
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D, bias=False)
        self.output = nn.Linear(D, D, bias=False)
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        nn.init.zeros_(self.output.weight)

        self.decay = LowRank(D, config.rank_or(config.decay_rank, 2.5), w0)
        a0 = 0.3 * zigzag + 0.4 * linear - 0.19
        self.rate = LowRank(D, config.rank_or(config.rate_rank, 2.5), a0)
        self.gate = LowRank(D, config.rank_or(config.gate_rank, 5.0))
        self.value_residual = None
        if has_value_residual:
            v0 = 0.73 - 0.4 * linear
            self.value_residual = LowRank(D, config.rank_or(config.value_rank, 1.7), v0)

        self.removal_scale = nn.Parameter(0.71 - 0.1 * linear)  # k_k
        self.rate_scale = nn.Parameter(torch.full((D,), 1.02))  # k_a
        self.bonus = nn.Parameter(torch.full((D,), -0.04))  # r_k
        self.norm = nn.GroupNorm(H, D, eps=N * config.norm_eps)
        nn.init.constant_(self.norm.weight, ((1 + layer_index) / depth) ** 0.7)

    def project(
        self, x: Tensor, previous: Tensor, v_first: Tensor | None
    ) -> tuple[Projected, Tensor]:
        """What x and the tokens before it (..., D) give the recurrence, and v_first (..., D)."""
        wide = recurrent_dtype(x.dtype)
        r = self.receptance(torch.lerp(x, previous, self.mix_r))
        k = self.key(torch.lerp(x, previous, self.mix_k))
        xv = torch.lerp(x, previous, self.mix_v)
        v: Tensor = self.value(xv)
        if self.value_residual is None or v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(self.value_residual(xv)))
        rate = torch.sigmoid(self.rate(torch.lerp(x, previous, self.mix_a)))
        xg = torch.lerp(x, previous, self.mix_g)
        gate = self.gate.up(torch.sigmoid(self.gate.down(xg)))
        # In bfloat16 a decay near 1 would round to it, so w0 is added in float32.
        hidden = torch.tanh(self.decay.down(torch.lerp(x, previous, self.mix_w)))
        decay_logits = F.linear(hidden, self.decay.up.weight).to(wide) + self.decay.up.bias.to(wide)
        kappa = F.normalize(self._heads(k * self.removal_scale).to(wide), dim=-1).to(x.dtype)
        k = k * (1 + (rate - 1) * self.rate_scale)
        r, decay_logits, k, v, rate = map(self._heads, (r, decay_logits, k, v, rate))
        return Projected(r, decay_logits, k, v, kappa, rate, gate), v_first

    def finish(self, y: Tensor, projected: Projected) -> Tensor:
        """What the recurrence read, y (..., H, N) -> the mix's output (..., D)."""
        r, k, v = projected.r, projected.k, projected.v
        D = self.norm.num_channels
        normed = self.norm(y.reshape(-1, D)).view_as(projected.gate)
        direct = (r * k * self._heads(self.bonus)).sum(dim=-1, keepdim=True) * v  # (..., H, N)
        return self.output((normed + direct.flatten(-2)) * projected.gate)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class ChannelMix(nn.Module):
    """The paper's MLP: two layers with squared ReLU and no gate, over shifted tokens."""

    def __init__(self, config: RWKV7Config, layer_index: int, depth: int) -> None:
        super().__init__()
        hidden = config.mlp_width or 4 * config.width
        self.mix = nn.Parameter(shift_mix(config.width, (1 - layer_index / depth) ** 4))
        self.key = nn.Linear(config.width, hidden, bias=False)
        self.value = nn.Linear(hidden, config.width, bias=False)
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.value.weight)

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """The mix of x and the tokens before it, (..., D) -> (..., D)."""
        return self.value(F.relu(self.key(torch.lerp(x, previous, self.mix))).square())


class RWKV7Block(Block):
    """Norm, time mix, residual; norm, channel mix, residual."""

    Config: ClassVar[type[BlockConfig]] = RWKV7Config
    has_kernels: ClassVar[bool] = True

    def __init__(
        self,
        config: RWKV7Config,
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
        self.operation = wkv7
        self.input_norm = self.final_norm() if layer_index == 0 else nn.Identity()
        self.time_norm = self.final_norm()
        self.channel_norm = self.final_norm()
        self.time_mix = TimeMix(config, layer_index, depth, self.kind_index > 0)
        self.channel_mix = ChannelMix(config, layer_index, depth)

    def forward(
        self, x: Tensor, state: RWKV7State | None = None, carry: Carry | None = None
    ) -> BlockOutput:
        """Run T >= 1 tokens x (B, T, D), continuing from `state` if one is given.

        Raises:
            ValueError: not the stack's first RWKV-7 block, and the carry lacks its values.
        """
        return self._run(x, state, carry)

    def step(self, x: Tensor, state: RWKV7State, carry: Carry | None = None) -> BlockOutput:
        """Run one token x (B, D) from `state`: the recurrence itself, on every backend."""
        return self._run(x, state, carry)

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> RWKV7State:
        """Zeros before the first token; the same size whatever `max_len`."""
        D, H, N = self.config.width, self.config.heads, self.config.head_dim
        return RWKV7State(
            torch.zeros(batch, D, device=device, dtype=dtype),
            torch.zeros(batch, D, device=device, dtype=dtype),
            torch.zeros(batch, H, N, N, device=device, dtype=recurrent_dtype(dtype)),
            0,
        )

    def mixer_flops(self, new_tokens: int, context: int = 0) -> int:
        """Forward FLOPs of the recurrence, a multiply-add counting 2.

        A token and head: N^2 to decay the state, and 2 N^2 each to read what is removed, to remove
        it, to write k v^T and to read y. Linear in new tokens and the same at any context. The
        chunked form does more: see `archs.ops.wkv7`.
        """
        return new_tokens * 9 * self.config.width * self.config.head_dim

    def final_norm(self) -> nn.Module:
        """LayerNorm, as the official model has before its head."""
        return nn.LayerNorm(self.config.width, eps=self.config.norm_eps)

    def init_ends(self, embedding: nn.Embedding, head: nn.Linear) -> None:
        """As the official trainer: a tiny embedding, which the first norm scales; a wide head."""
        vocab, D = head.weight.shape
        nn.init.uniform_(embedding.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(head.weight, gain=0.5 * max(1.0, math.sqrt(vocab / D)))

    def _run(self, x: Tensor, state: RWKV7State | None, carry: Carry | None) -> BlockOutput:
        """`forward` for x (B, T, D), `step` for x (B, D)."""
        x = self.input_norm(x)
        time_in = self.time_norm(x)
        previous = shifted(time_in, None if state is None else state.time_shift)
        projected, v_first = self.time_mix.project(time_in, previous, self._values(carry))
        y, wkv = self._recurrence(projected, None if state is None else state.wkv)
        x = x + self.time_mix.finish(y, projected)
        channel_in = self.channel_norm(x)
        previous = shifted(channel_in, None if state is None else state.channel_shift)
        x = x + self.channel_mix(channel_in, previous)
        carry = {**(carry or {}), CARRY: v_first}
        if state is None or wkv is None:
            return BlockOutput(x, None, carry)
        tokens = 1 if x.ndim == 2 else x.shape[1]
        state = RWKV7State(last(time_in), last(channel_in), wkv, state.position + tokens)
        return BlockOutput(x, state, carry)

    def _values(self, carry: Carry | None) -> Tensor | None:
        """V_first of the stack's first RWKV-7 block, unless this is that block."""
        if self.kind_index == 0:
            return None
        if carry is None or CARRY not in carry:
            raise ValueError(
                f"layer {self.layer_index} needs the values of the stack's first RWKV-7 block: "
                "pass on the carry that block returned"
            )
        return carry[CARRY]

    def _recurrence(
        self, projected: Projected, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        r, decay_logits, k, v, kappa, rate, _ = projected
        if r.ndim == 3:
            assert state is not None
            inputs = k, v, -kappa, kappa * rate, state
            if self.backend == "triton":
                return wkv7_step_triton(r, decay_logits, *inputs)
            return wkv7_step(r, log_decay_of(decay_logits), *inputs)
        return self.operation(
            r,
            None,
            k,
            v,
            -kappa,
            kappa * rate,
            state,
            decay_logits=decay_logits,
            backend=self.backend,
        )


def shift_mix(width: int, power: float) -> Tensor:
    """How much of the previous token each channel starts with: 1 - (i / D)^power, (D,)."""
    return 1 - (torch.arange(width) / width) ** power


def shifted(x: Tensor, before: Tensor | None) -> Tensor:
    """The token before each of x (B, T, D); `before` (B, D) came last, None means zeros.

    For one token x (B, D) that is `before` itself.
    """
    if before is None:
        return F.pad(x, (0, 0, 1, -1))
    if x.ndim == 2:
        return before
    return torch.cat((before[:, None], x[:, :-1]), dim=1)


def last(x: Tensor) -> Tensor:
    """The last token (B, D) of x (B, T, D), or the one token x; a copy, which does not keep x."""
    return x.clone() if x.ndim == 2 else x[:, -1].clone()
