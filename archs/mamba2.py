"""Mamba-2: a state space layer whose recurrence has one scalar decay a head (SSD).

Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 7.1 (block) and 5 (SSD); details and
initialisation as in the official code, `mamba_ssm.modules.mamba2.Mamba2` in a pre-norm residual.

    z, x, B, C, dt  = W_in RMSNorm(input)
    x, B, C         = silu(short_conv(x, B, C))
    dt_t            = softplus(dt_t + dt_bias)
    S_t             = exp(-exp(A_log) dt_t) S_{t-1} + (dt_t x_t) B_t^T
    y_t             = S_t C_t + D x_t
    output          = input + W_out GroupRMSNorm(y * silu(z))

Letters: B batch, T tokens, D width, E expansion, H = E D / P heads, P head dimension, N state
dimension, G groups of heads that share B_t and C_t and a norm, W convolution taps.

**Differs from the paper:** Nothing. With G > 1 each group of channels is normalised by itself, as
in the official code.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.block import Block, BlockConfig, BlockOutput, Carry, recurrent_dtype
from archs.layers import RMSNorm
from archs.ops import Backend, no_such_backend
from archs.ops.short_conv import short_conv, short_conv_step, short_conv_step_triton
from archs.ops.ssd import ssd, ssd_step, ssd_step_triton


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(BlockConfig):
    """Sizes and the ranges that the time steps and decays start in."""

    d_state: int = 128  # N
    head_dim: int = 64  # P
    expand: int = 2  # E
    groups: int = 1  # G
    conv_width: int = 4  # W
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    decay_min: float = 1.0  # -A
    decay_max: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.d_state, self.head_dim, self.expand, self.groups) < 1:
            raise ValueError(
                "d_state, head_dim, expand and groups must be positive, got "
                f"{self.d_state}, {self.head_dim}, {self.expand} and {self.groups}"
            )
        if self.inner_width % self.head_dim:
            raise ValueError(
                f"expand * width = {self.inner_width} must be a multiple of head_dim = "
                f"{self.head_dim}: change width or head_dim"
            )
        if self.heads % self.groups:
            raise ValueError(
                f"the {self.heads} heads (expand * width / head_dim) must be a multiple of groups "
                f"= {self.groups}: change groups"
            )
        if not 2 <= self.conv_width <= 4:
            raise ValueError(f"conv_width must be 2, 3 or 4, got {self.conv_width}")
        if not 0 < self.dt_min <= self.dt_max or self.dt_floor <= 0:
            raise ValueError(
                "time steps need 0 < dt_min <= dt_max and 0 < dt_floor, got "
                f"{self.dt_min}, {self.dt_max} and {self.dt_floor}"
            )
        if not 0 < self.decay_min <= self.decay_max:
            raise ValueError(
                f"decays need 0 < decay_min <= decay_max, got {self.decay_min} and {self.decay_max}"
            )

    @property
    def inner_width(self) -> int:
        """Channels of x, y and z."""
        return self.expand * self.width

    @property
    def heads(self) -> int:
        """H."""
        return self.inner_width // self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of x, B and C, which the short convolution mixes."""
        return self.inner_width + 2 * self.groups * self.d_state


class Mamba2State(NamedTuple):
    """What the block remembers: constant in size."""

    conv: Tensor  # (B, conv_channels, W-1), the last inputs of the short convolution
    ssm: Tensor  # (B, H, P, N)
    position: int


class GatedRMSNorm(nn.Module):
    """RMS norm of y * silu(z), over each group of channels by itself."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate and normalise y, z (..., E D) in float32 (or float64); y's type out."""
        wide = recurrent_dtype(y.dtype)
        gated = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight.to(wide)).to(y.dtype)


class Mamba2Block(Block):
    """Pre-norm, Mamba-2 mixer, residual."""

    Config: ClassVar[type[BlockConfig]] = Mamba2Config
    has_kernels: ClassVar[bool] = True

    def __init__(
        self,
        config: Mamba2Config,
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
        self.operation = ssd
        inner, channels, heads = config.inner_width, config.conv_channels, config.heads
        self.pre_norm = RMSNorm(config.width, config.norm_eps)
        self.in_proj = nn.Linear(config.width, inner + channels + heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(inner, config.groups, config.norm_eps)
        self.out_proj = nn.Linear(inner, config.width, bias=False)
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """As the official code: `Mamba2.__init__` and `mixer_seq_simple._init_weights`."""
        config = self.config
        bound = 1 / math.sqrt(config.conv_width)  # nn.Conv1d with one input channel a group
        self.conv_weight.uniform_(-bound, bound)
        self.conv_bias.uniform_(-bound, bound)
        log_dt = torch.empty_like(self.dt_bias).uniform_(
            math.log(config.dt_min), math.log(config.dt_max)
        )
        dt = log_dt.exp().clamp(min=config.dt_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log.uniform_(config.decay_min, config.decay_max).log_()
        # One residual branch a block, so the stack's variance grows with its depth.
        self.out_proj.weight.div_(math.sqrt(self.depth))

    def forward(
        self, x: Tensor, state: Mamba2State | None = None, carry: Carry | None = None
    ) -> BlockOutput:
        """Run T >= 1 tokens x (B, T, D), continuing from `state` if one is given."""
        conv_state, ssm_state = (None, None) if state is None else (state.conv, state.ssm)
        z, mixed, dt = self._project(x)
        mixed, conv_state = short_conv(
            mixed,
            self.conv_weight,
            self.conv_bias,
            conv_state,
            activation="silu",
            backend=self.backend,
        )
        u, b, c = self._split(mixed)
        log_decay, dt = self._discretise(dt)
        y, ssm_state = self.operation(
            u, log_decay, b, c, ssm_state, dt=dt, skip=self.D, backend=self.backend
        )  # (B, T, H, P)
        y = x + self.out_proj(self.norm(y.flatten(-2), z))  # (B, T, D)
        if state is None or conv_state is None or ssm_state is None:
            return BlockOutput(y, None, carry)
        position = state.position + x.shape[1]
        return BlockOutput(y, Mamba2State(conv_state, ssm_state, position), carry)

    def step(self, x: Tensor, state: Mamba2State, carry: Carry | None = None) -> BlockOutput:
        """Run one token x (B, D) from `state`: the recurrence itself."""
        if self.backend == "triton":
            step_conv, step_ssd = short_conv_step_triton, ssd_step_triton
        elif self.backend in ("reference", "torch"):
            step_conv, step_ssd = short_conv_step, ssd_step
        else:
            raise no_such_backend("mamba2 step", self.backend)
        z, mixed, dt = self._project(x)
        mixed, conv_state = step_conv(mixed, self.conv_weight, self.conv_bias, state.conv, "silu")
        u, b, c = self._split(mixed)
        log_decay, dt = self._discretise(dt)
        y, ssm_state = step_ssd(u, log_decay, b, c, state.ssm, dt, self.D)  # (B, H, P)
        y = x + self.out_proj(self.norm(y.flatten(-2), z))  # (B, D)
        return BlockOutput(y, Mamba2State(conv_state, ssm_state, state.position + 1), carry)

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> Mamba2State:
        """Zeros before the first token; the same size whatever `max_len`."""
        config = self.config
        conv = (batch, config.conv_channels, config.conv_width - 1)
        ssm = (batch, config.heads, config.head_dim, config.d_state)
        return Mamba2State(
            torch.zeros(conv, device=device, dtype=dtype),
            torch.zeros(ssm, device=device, dtype=recurrent_dtype(dtype)),
            0,
        )

    def mixer_flops(self, new_tokens: int, context: int = 0) -> int:
        """Forward FLOPs of the recurrence and the short convolution, a multiply-add counting 2.

        A token and head: 2 P N to add the outer product to the state, P N to decay the state,
        2 P N to read it. A token: 2 W for each channel of the convolution. Linear in new tokens
        and the same at any context. The chunked form does more: see `archs.ops.ssd`.
        """
        config = self.config
        recurrence = 5 * config.heads * config.head_dim * config.d_state
        return new_tokens * (recurrence + 2 * config.conv_width * config.conv_channels)

    def final_norm(self) -> nn.Module:
        """RMSNorm, as the official model has before its head."""
        return RMSNorm(self.config.width, self.config.norm_eps)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> z (..., E D), the convolution's input (..., conv_channels), dt (..., H)."""
        config = self.config
        sizes = [config.inner_width, config.conv_channels, config.heads]
        z, mixed, dt = self.in_proj(self.pre_norm(x)).split(sizes, dim=-1)
        return z, mixed, dt

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., conv_channels) -> x (..., H, P), B and C (..., G, N)."""
        config = self.config
        bc = config.groups * config.d_state
        x, b, c = mixed.split([config.inner_width, bc, bc], dim=-1)
        groups = (config.groups, config.d_state)
        return (
            x.unflatten(-1, (config.heads, config.head_dim)),
            b.unflatten(-1, groups),
            c.unflatten(-1, groups),
        )

    def _discretise(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """The log-decay and time step of each token and head (..., H), in float32 or float64."""
        wide = recurrent_dtype(dt.dtype)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        return -self.A_log.to(wide).exp() * dt, dt
