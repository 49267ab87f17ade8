"""A Hyena block: gates and long convolutions with implicit filters, then a GELU MLP.

Poli et al. 2023, "Hyena Hierarchy: Towards Larger Convolutional Language Models" (arXiv
2302.10866, section 3), in the form of its official code (HazyResearch/safari, `HyenaOperator`,
`HyenaFilter` and its language model).

With n = LayerNorm(x), and every product by channel:

    (x_0, ..., x_{N-1}, v) = short(W_in n + b_in)      causal, depthwise, 3 taps and a bias
    z^o = x_{N-o} * v^{o-1},   v^o = h^o (*) z^o + skip^o * z^o      for o = 1, ..., N-1; v^0 = v
    x += W_out (x_0 * v^{N-1}) + b_out
    x += W_down gelu(W_up LayerNorm(x) + b_up) + b_down

(*) is the causal convolution over the whole past. The filter is a function of the position p, for
t = p / (L-1) and w = 2 pi p / L with L = max_len:

    h^o_p = window_p * FFN(t, cos(f_k w), -sin(f_k w)),   window_p = exp(-t |delta|) + shift
    FFN: linear layers with sin(frequency * .) between them, the frequencies learned

Position and window are measured against `max_len`, never against a call's T: a tap does not
depend on how much is convolved at once. To train short and evaluate long, set max_len to the
evaluation length. There is no state of constant size: decoding keeps every z. With
`decode="direct"`, the default and the definition, a token sums over all of them. With "lazy" the
sums that later outputs need are formed ahead, in tiles (`archs.ops.long_conv_lazy`): O(log^2 T) a
token on average, for as many numbers of state again, in float32, and the filters' spectra.

Letters: B batch, T tokens, D width, N order, L max_len.

Differs from the paper:
- an order counts gates, as in the official code: N gates and N - 1 long convolutions, so that the
  default, 2, has one long convolution. The paper's recurrence has N of both;
- positional features are constants. The official code trains them, with a learning rate of their
  own (1e-5 unless set; its Pile configuration sets the optimiser's);
- the MLP is 4 D wide unless set, as in GPT-2; the official Pile configuration takes 2 D;
- no dropout (official: 0.1 on the embedding), and the residual stream has the type of the input
  (official: float32);
- the filter is formed in float32 at least, its positional features in float64.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.block import Block, BlockConfig, BlockOutput, Carry, parameter_bytes, recurrent_dtype
from archs.ops import Backend, in_its_own_types
from archs.ops.long_conv import long_conv, long_conv_step, long_conv_step_triton
from archs.ops.long_conv_lazy import DIRECT_TILE, add_tiles, long_conv_lazy_step, tile_filter
from archs.ops.short_conv import short_conv

SHORT_WIDTH = 3  # taps of the short convolutions; official short_filter_order

# The window falls to 1e-2 after 0.3 of max_len in the fastest channel and after 1.5 in the
# slowest; official ExponentialModulation.
WINDOW_TARGET, WINDOW_FASTEST, WINDOW_SLOWEST = 1e-2, 0.3, 1.5


@dataclass(frozen=True, kw_only=True)
class HyenaConfig(BlockConfig):
    """Sizes of a Hyena block; the filter's defaults are the official Pile language model's."""

    order: int = 2  # N
    mlp_width: int | None = None  # None means 4 D
    filter_width: int = 64  # of the FFN; official filter_order
    filter_features: int = 33  # t, and as many cosines as sines; official emb_dim
    filter_inner_layers: int = 2  # between the FFN's first and last; official num_inner_mlps
    filter_sine_frequency: float = 14.0  # initial; official w
    window_shift: float = 0.0
    decode: Literal["direct", "lazy"] = "direct"  # how a step forms its sums over the past

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order < 2:
            raise ValueError(
                f"order must be at least 2, which is one long convolution, got {self.order}"
            )
        if self.mlp_width is not None and self.mlp_width < 1:
            raise ValueError(f"mlp_width must be at least 1, got {self.mlp_width}")
        if self.filter_width < 1 or self.filter_inner_layers < 0:
            raise ValueError(
                "filter_width must be at least 1 and filter_inner_layers at least 0, "
                f"got {self.filter_width} and {self.filter_inner_layers}"
            )
        if self.filter_features < 3 or self.filter_features % 2 == 0:
            raise ValueError(
                "filter_features must be odd and at least 3 (time, cosines and sines), "
                f"got {self.filter_features}"
            )
        if self.decode not in ("direct", "lazy"):
            raise ValueError(f"decode must be 'direct' or 'lazy', got {self.decode!r}")

    @property
    def hidden_width(self) -> int:
        """Width of the MLP."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width


class HyenaState(NamedTuple):
    """The short convolutions' last inputs, and all that the long convolutions have read.

    `history` is filled up to `position`. A state passed in is consumed: stepping an old one again
    overwrites the same slot, and with `pending` adds a tile a second time.
    """

    short_tail: Tensor  # (B, (N+1) D, 2)
    history: Tensor  # (N-1, B, D, capacity)
    position: int  # tokens consumed so far
    # Lazy decoding's sums for outputs to come, like history but float32 or float64.
    pending: Tensor | None = None


class _Formed(NamedTuple):
    """Filters in full length, and what tiles read of them, by the size of the tile."""

    key: tuple  # what the parameters were
    reversed_taps: Tensor  # (N-1, D, max_len)
    tile_filters: dict[int, Tensor]


class HyenaFilter(nn.Module):
    """The N-1 implicit filters of a block, as functions of the position."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.config = config
        width = config.filter_width
        self.input = nn.Linear(config.filter_features, width)
        self.inner = nn.ModuleList(
            nn.Linear(width, width) for _ in range(config.filter_inner_layers)
        )
        self.output = nn.Linear(width, (config.order - 1) * config.width, bias=False)
        # One vector for all layers: the official layers share one activation module.
        self.frequency = nn.Parameter(torch.full((width,), float(config.filter_sine_frequency)))
        self._materialised: _Formed | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type that filters are computed in."""
        return torch.promote_types(self.frequency.dtype, torch.float32)

    def forward(self, length: int) -> Tensor:
        """Taps 0 to length - 1 of all filters, (N-1, D, length)."""
        if torch.is_grad_enabled():
            # An optimiser step may follow, and fused ones do not count as a new version.
            self._materialised = None
        config = self.config
        t, h = positional_features(
            length, config.max_len, config.filter_features, self.frequency.device, self.dtype
        )
        filters = self._features_to_filters(h)  # ((N-1) D, length)
        window = torch.outer(window_rates(config, t), -t).exp_().add_(config.window_shift)
        return (filters * window).unflatten(0, (config.order - 1, config.width))

    @in_its_own_types
    def _features_to_filters(self, h: Tensor) -> Tensor:
        """The FFN: positions' features (length, features) to ((N-1) D, length)."""
        layers: list[Any] = [self.input, *self.inner]
        for layer in layers:
            pre = F.linear(h, layer.weight.to(self.dtype), layer.bias.to(self.dtype))
            h = torch.sin(self.frequency.to(self.dtype) * pre)  # (length, filter width)
        return self.output.weight.to(self.dtype) @ h.T

    def reversed_taps(self, length: int, *, record: bool) -> Tensor:
        """Taps length - 1 to 0, (N-1, D, length).

        Unless gradients are recorded they come from filters formed once, in full length, and
        again after a change of parameters (one through `.data` goes unnoticed) or a pass that
        recorded gradients.
        """
        if record:
            return self(length).flip(-1)
        taps = self._formed().reversed_taps
        return taps[..., taps.shape[-1] - length :]

    def tile_filter(self, size: int, *, record: bool) -> Tensor:
        """What tiles of `size` tokens read (`archs.ops.long_conv_lazy`), kept as the taps are."""
        if record:
            return tile_filter(self(min(2 * size, self.config.max_len)), size)
        formed = self._formed()
        if size not in formed.tile_filters:
            with torch.no_grad():
                taps = formed.reversed_taps[..., -2 * size :].flip(-1)
                formed.tile_filters[size] = tile_filter(taps, size)
        return formed.tile_filters[size]

    def _formed(self) -> _Formed:
        """The filters of the parameters as they are."""
        key = tuple(
            # An inference tensor does not count its versions: form the filters every time.
            (p.data_ptr(), object() if p.is_inference() else p._version, p.dtype, p.device)
            for p in self.parameters()
        )
        if self._materialised is None or self._materialised.key != key:
            with torch.no_grad():
                self._materialised = _Formed(key, self(self.config.max_len).flip(-1), {})
        return self._materialised

    def flops(self, length: int) -> int:
        """Forward FLOPs of the FFN over `length` positions."""
        layers: list[Any] = [self.input, *self.inner, self.output]
        return 2 * length * sum(layer.weight.numel() for layer in layers)

    def _apply(self, fn: Any, recurse: bool = True) -> "HyenaFilter":
        # Parameters that were converted twice may lie at their old address with other values.
        self._materialised = None
        return super()._apply(fn, recurse)


class HyenaBlock(Block):
    """One pre-norm layer: the Hyena operator, then a GELU MLP, each added to the residual stream.

    Raises:
        ValueError: from every method, for more tokens in all than `max_len` or a state's capacity.
    """

    Config: ClassVar[type[BlockConfig]] = HyenaConfig
    has_kernels: ClassVar[bool] = True

    def __init__(
        self,
        config: HyenaConfig,
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
        self.operation = long_conv
        width, signals = config.width, (config.order + 1) * config.width
        self.operator_norm = nn.LayerNorm(width, config.norm_eps)
        self.in_proj = nn.Linear(width, signals)  # x_0, ..., x_{N-1}, v
        self.short_weight = nn.Parameter(torch.empty(signals, SHORT_WIDTH))
        self.short_bias = nn.Parameter(torch.empty(signals))
        self.filter = HyenaFilter(config)
        self.skip = nn.Parameter(torch.randn(config.order - 1, width))
        self.out_proj = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, config.norm_eps)
        self.mlp_up = nn.Linear(width, config.hidden_width)
        self.mlp_down = nn.Linear(config.hidden_width, width)

        # The official language model's: GPT-2's for all linear layers, the filter's included, and
        # nn.Conv1d's own for the short convolutions.
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for layer in (self.out_proj, self.mlp_down):
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * depth))
        bound = 1 / math.sqrt(SHORT_WIDTH)
        nn.init.uniform_(self.short_weight, -bound, bound)
        nn.init.uniform_(self.short_bias, -bound, bound)

    def forward(
        self, x: Tensor, state: HyenaState | None = None, carry: Carry | None = None
    ) -> BlockOutput:
        """Run T >= 1 tokens x (B, T, D), continuing from `state` if one is given."""
        normed = self.operator_norm(x)
        if state is None:
            y = self._mix(normed)
        else:
            y, state = self._mix_from(normed, state)
        return BlockOutput(self._finish(x, y), state, carry)

    def step(self, x: Tensor, state: HyenaState, carry: Carry | None = None) -> BlockOutput:
        """Run one token x (B, D): a direct sum over the history, O(position).

        From a state with `pending` O(log^2) of it on average: after token i a tile is added, as
        long as the largest power of two that divides i. Few tokens wait for a long one.
        """
        record = self._records(x, state)
        end = self._room(1, state)
        signals, tail = self._short(self.in_proj(self.operator_norm(x)).unsqueeze(1), state)
        gates, v = self._split(signals.squeeze(1))
        taps = self.filter.reversed_taps(end if state.pending is None else 1, record=record)
        direct = long_conv_step_triton if self.backend == "triton" else long_conv_step
        zs = []
        for o, gate in enumerate(reversed(gates[1:])):
            gated = {"pre_gate": gate, "skip": self.skip[o]}
            if state.pending is None:
                history = state.history[o, :, :, : state.position]
                v, z = direct(v, taps[o], history, **gated)
            else:
                owed = state.pending[o, :, :, state.position]
                v, z = long_conv_lazy_step(v, taps[o, :, 0], owed, **gated)
            zs.append(z.unsqueeze(-1))
        state = self._advance(state, tail, zs, record)
        return BlockOutput(self._finish(x, gates[0] * v), state, carry)

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> HyenaState:
        """Zeros, with room for `max_len` tokens."""
        self._room(max_len)
        width, order = self.config.width, self.config.order
        tail = torch.zeros(batch, (order + 1) * width, SHORT_WIDTH - 1, device=device, dtype=dtype)
        history = torch.zeros(order - 1, batch, width, max_len, device=device, dtype=dtype)
        if self.config.decode == "direct":
            return HyenaState(tail, history, 0)
        pending = torch.zeros_like(history, dtype=recurrent_dtype(dtype))
        return HyenaState(tail, history, 0, pending)

    def mixer_flops(self, new_tokens: int, context: int = 0) -> int:
        """FLOPs of short and long convolutions, skips and gates.

        A channel's long convolution costs what the cheaper of two forms does: the direct sum,
        2 for each pair of a new token and one that it reads; or, with the filter's spectrum given
        (it counts in `shared_flops`), two real FFTs of length N = context + 2 new_tokens at
        2.5 N log2 N (FFTW's count, Frigo and Johnson 2005) and N/2 complex products of 6.

        In lazy decoding one token after others counts as the mean of all up to there, as its own
        tile may be of any length. The tiles that a prompt adds for later outputs do not count.
        """
        order = self.config.order
        if self.config.decode == "lazy" and new_tokens == 1 and context > 0:
            long = 2 + lazy_mean(context, tile_flops)
        else:
            long, _ = long_conv_flops(new_tokens, context)
        short = 2 * SHORT_WIDTH * (order + 1) * new_tokens
        gates_and_skips = (order + 2 * (order - 1)) * new_tokens
        return self.config.width * ((order - 1) * long + short + gates_and_skips)

    def shared_flops(self, new_tokens: int, context: int = 0) -> int:
        """FLOPs of the filters' FFN over the positions used, and of the filters' spectra.

        The FFN counts where a sequence starts: later tokens find the filters formed.
        """
        _, spectrum = long_conv_flops(new_tokens, context)
        ffn = self.filter.flops(new_tokens) if context == 0 else 0
        return ffn + (self.config.order - 1) * self.config.width * spectrum

    def projections(self) -> Iterator[nn.Linear]:
        """The linear layers applied to every token, which the filter's are not."""
        return iter((self.in_proj, self.out_proj, self.mlp_up, self.mlp_down))

    def step_weight_bytes(self, position: int) -> int:
        """Bytes of all parameters but the filter's, and of the filters' taps up to `position`.

        In lazy decoding tap 0 and, as the mean of all tokens up to there, what tiles read.
        """
        lazy = self.config.decode == "lazy"
        taps = 1 + lazy_mean(position, tile_filter_numbers) if lazy else position + 1
        channels = (self.config.order - 1) * self.config.width
        tap_bytes = channels * taps * self.filter.dtype.itemsize
        return parameter_bytes(self) - parameter_bytes(self.filter) + tap_bytes

    def step_state_bytes(self, batch: int, position: int, dtype: torch.dtype) -> int:
        """Bytes of all the state.

        In lazy decoding of the short convolutions' tail, the token's own z and sum and, as the
        mean of all tokens up to there, those of a tile.
        """
        if self.config.decode == "direct":
            return super().step_state_bytes(batch, position, dtype)
        config = self.config
        tail = (config.order + 1) * config.width * (SHORT_WIDTH - 1) * dtype.itemsize
        tokens = 1 + lazy_mean(position, lambda size: size)
        a_token = dtype.itemsize + recurrent_dtype(dtype).itemsize
        return batch * (tail + (config.order - 1) * config.width * tokens * a_token)

    def final_norm(self) -> nn.Module:
        """The official language model's: a LayerNorm."""
        return nn.LayerNorm(self.config.width, self.config.norm_eps)

    def _mix(self, normed: Tensor) -> Tensor:
        """The operator up to its out-projection, from the start of a sequence: (B, T, D)."""
        T = normed.shape[1]
        self._room(T)
        filters = self.filter(T)  # (N-1, D, T)
        fused = {}
        if self.config.order == 2:
            signals = self._project_to_channels(normed)
            fused["short_filters"] = self.short_weight.unflatten(0, (3, -1))
            fused["short_bias"] = self.short_bias.unflatten(0, (3, -1))
        else:
            signals = self._short(self.in_proj(normed))[0].transpose(1, 2)
        gates, v = self._split(signals, 1)
        for o, gate in enumerate(reversed(gates[1:])):
            v = self.operation(
                v,
                filters[o],
                pre_gate=gate,
                post_gate=gates[0] if o == len(filters) - 1 else None,
                skip=self.skip[o],
                **fused,
                backend=self.backend,
            )
        return v.transpose(1, 2)

    def _mix_from(self, normed: Tensor, state: HyenaState) -> tuple[Tensor, HyenaState]:
        """The operator up to its out-projection, from a state: (B, T, D), and the next state."""
        record = self._records(normed, state)
        end = self._room(normed.shape[1], state)
        signals, tail = self._short(self.in_proj(normed), state)
        gates, v = self._split(signals.transpose(1, 2), 1)
        filters = self.filter.reversed_taps(end, record=record).flip(-1)  # (N-1, D, end)
        zs = []
        for o, gate in enumerate(reversed(gates[1:])):
            zs.append(gate * v)
            v = self.operation(
                zs[o],
                filters[o],
                post_gate=gates[0] if o == len(filters) - 1 else None,
                skip=self.skip[o],
                history=state.history[o, :, :, : state.position],
                backend=self.backend,
            )
        return v.transpose(1, 2), self._advance(state, tail, zs, record)

    def _project_to_channels(self, normed: Tensor) -> Tensor:
        """In-projection of (B, T, D) to (B, 3 D, T) in which every channel is contiguous.

        One matrix product writes (3 D, B T).
        """
        weight, bias = self.in_proj.weight, self.in_proj.bias
        signals = torch.addmm(bias.unsqueeze(1), weight, normed.flatten(0, 1).T)
        return signals.unflatten(1, normed.shape[:2]).transpose(0, 1)

    def _short(
        self, signals: Tensor, state: HyenaState | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The short convolutions of signals (B, T, (N+1) D), and their next tail."""
        tail = None if state is None else state.short_tail
        return short_conv(signals, self.short_weight, self.short_bias, tail, backend=self.backend)

    def _split(self, signals: Tensor, axis: int = -1) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gates x_0, ..., x_{N-1}, and v."""
        *gates, v = signals.chunk(self.config.order + 1, axis)
        return tuple(gates), v

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the operator's out-projection to the residual stream x, then the MLP's output."""
        x = x + self.out_proj(y)
        hidden = F.gelu(self.mlp_up(self.mlp_norm(x)), approximate="tanh")
        return x + self.mlp_down(hidden)

    def _records(self, x: Tensor, state: HyenaState) -> bool:
        """Whether gradients are recorded for anything that a step reads."""
        tensors = (x, *state, *self.parameters())
        return torch.is_grad_enabled() and any(
            isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors
        )

    def _room(self, new_tokens: int, state: HyenaState | None = None) -> int:
        """Tokens seen after `new_tokens` more."""
        end = new_tokens if state is None else state.position + new_tokens
        if end > self.config.max_len:
            raise ValueError(
                f"{end} tokens are more than max_len {self.config.max_len}, the length of Hyena's "
                f"filter: raise max_len when building the block"
            )
        if state is not None and end > state.history.shape[-1]:
            raise ValueError(
                f"the state has room for {state.history.shape[-1]} tokens, not {end}: "
                f"call init_state with max_len of at least {end}"
            )
        return end

    def _advance(
        self, state: HyenaState, tail: Tensor | None, zs: list[Tensor], record: bool
    ) -> HyenaState:
        """The state after tokens whose long convolutions read zs, each (B, D, T)."""
        assert tail is not None
        history, pending, start = state.history, state.pending, state.position
        end = start + zs[0].shape[-1]
        keep = record or history.requires_grad or (pending is not None and pending.requires_grad)
        if keep:
            new = torch.stack(zs)
            history = torch.cat([history[..., :start], new, history[..., end:]], -1)
        else:
            for o, z in enumerate(zs):
                history[o, :, :, start:end] = z
        if pending is not None:
            pending = pending.clone() if keep else pending
            filters = partial(self.filter.tile_filter, record=record)
            add_tiles(pending, history[..., :end], start, filters, backend=self.backend)
        return HyenaState(tail, history, end, pending)


def positional_features(
    length: int, max_len: int, features: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of the first positions, t (length,), and t, cosines and negative sines (length, features).

    As in the official code, t runs from 0 to 1 over max_len positions, and the frequencies are
    evenly spaced from 1e-4 to the number of cosines less one, in cycles per max_len.
    """
    bands = (features - 1) // 2
    position = torch.arange(length, device=device, dtype=torch.float64)
    t = position / max(1, max_len - 1)
    cycles = torch.linspace(1e-4, bands - 1, bands, device=device, dtype=torch.float64)
    angle = torch.outer(position * (2 * math.pi / max_len), cycles)  # (length, bands)
    columns = torch.cat([t.unsqueeze(1), angle.cos(), -angle.sin()], 1)
    return t.to(dtype), columns.to(dtype)


def window_rates(config: HyenaConfig, like: Tensor) -> Tensor:
    """|delta|, ((N-1) D,): the decay over max_len of each channel of each filter.

    Evenly spaced over channels, and within a channel over the orders.
    """
    slowest, fastest = (
        -math.log(WINDOW_TARGET) / share for share in (WINDOW_SLOWEST, WINDOW_FASTEST)
    )
    orders = config.order - 1
    rates = torch.linspace(
        slowest, fastest, orders * config.width, device=like.device, dtype=torch.float64
    )
    return rates.view(config.width, orders).T.flatten().to(like.dtype)


def long_conv_flops(new_tokens: int, context: int) -> tuple[int, int]:
    """FLOPs of one channel's long convolution: for every sequence, and once for the filter."""
    direct = new_tokens * (2 * context + new_tokens + 1)
    by_spectra, spectrum = fft_conv_flops(context + 2 * new_tokens)
    return (direct, 0) if direct <= by_spectra + spectrum else (by_spectra, spectrum)


def fft_conv_flops(length: int) -> tuple[int, int]:
    """FLOPs of convolving by FFTs of `length`, the filter's spectrum given; and of that."""
    fft = round(2.5 * length * math.log2(length))
    return 2 * fft + 3 * length, fft


def lazy_mean(position: int, of_tile: Callable[[int], int]) -> int:
    """What tiles cost a token on average, given what one costs: one of U comes every 2U tokens.

    The average is over all tokens up to the one at `position`.
    """
    sizes = (2**k for k in range((position + 1).bit_length()))
    return round(sum(of_tile(size) / (2 * size) for size in sizes))


def tile_flops(size: int) -> int:
    """FLOPs of a tile of `size` tokens in one channel."""
    return 2 * size**2 if size <= DIRECT_TILE else fft_conv_flops(2 * size)[0]


def tile_filter_numbers(size: int) -> int:
    """Real numbers that a tile of `size` tokens reads of one channel's filter."""
    return size**2 if size <= DIRECT_TILE else 2 * (size + 1)
