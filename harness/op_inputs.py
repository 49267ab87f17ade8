"""What the operation of each architecture is fed: the shapes and types that its block gives it.

An `Op` also knows which axes of its tensors are batch rows, heads (or channels) and tokens, so that
`harness.correctness` can check a few heads of one row, and the end of a long sequence.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from archs.block import recurrent_dtype
from archs.hyena import HyenaConfig, long_conv_flops
from archs.mamba2 import Mamba2Config
from archs.ops import Backend, no_such_backend
from archs.ops.attention import attention
from archs.ops.long_conv import long_conv, long_conv_step, long_conv_step_triton
from archs.ops.short_conv import short_conv
from archs.ops.ssd import ssd, ssd_step, ssd_step_triton
from archs.ops.wkv7 import log_decay_of, wkv7, wkv7_step, wkv7_step_triton
from archs.rwkv7 import RWKV7Config
from archs.transformer import TransformerConfig

Randn = Callable[..., Tensor]  # randn(*shape), float32, seeded, on the device
Tensors = dict[str, Tensor]
Operation = Callable[..., Any]  # with the signature of one in `archs.ops`


class Axes(NamedTuple):
    """Where a tensor has its batch rows, its heads (groups, channels) and its tokens."""

    batch: int | None = None
    heads: int | None = None
    tokens: int | None = None


class Op(ABC):
    """An architecture's operation: its inputs, the call that is timed, and its parts.

    Args:
        config: of the block whose shapes it takes.
        dtype: of the activations; decays and filters have the type that the block forms them in.
    """

    AXES: ClassVar[Mapping[str, Axes]]  # of what `inputs` returns, and of the result "y"
    STEP_AXES: ClassVar[Mapping[str, Axes]]  # of what `token` returns
    LIKE_Y: ClassVar[str]  # the input that has the shape and type of y

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        self.wide = recurrent_dtype(dtype)

    @abstractmethod
    def inputs(self, B: int, T: int, randn: Randn) -> Tensors:
        """Random inputs of T tokens."""

    @abstractmethod
    def run(self, inputs: Tensors, backend: Backend, operation: Operation | None = None) -> Tensor:
        """The timed call: y of all tokens, from no state; `operation` replaces ours."""

    @abstractmethod
    def tail(self, inputs: Tensors, tokens: int) -> tuple[Tensors, Tensor]:
        """Fold over the last `tokens`, from what `torch` reaches before them.

        Returns:
            The inputs of these tokens alone, as leaves that record gradients, and their y.
        """

    @abstractmethod
    def token(self, B: int, position: int, randn: Randn) -> Tensors:
        """Random inputs of one token, and what the block keeps at `position` > 0."""

    @abstractmethod
    def step(
        self, token: Tensors, backend: Backend, operation: Operation | None = None
    ) -> tuple[Tensor, ...]:
        """The call that the block's step makes: y of one token, and the next state if it has one.

        `operation` replaces ours where the step is a call of the operation: in attention.

        Raises:
            BackendUnavailableError: the block has no step of its own on this backend.
        """

    def extra_flops(self, T: int) -> int:
        """FLOPs of the call that the block's `mixer_flops` leaves out."""
        return 0

    def _last(self, inputs: Tensors, tokens: int) -> tuple[Tensors, Tensors]:
        """Inputs before the last tokens, and those of the last tokens as leaves."""
        before, last = {}, {}
        for name, x in inputs.items():
            axis = self.AXES[name].tokens
            if axis is None:
                before[name] = x
                continue
            start = x.shape[axis] - tokens
            before[name] = x.narrow(axis, 0, start)
            last[name] = x.narrow(axis, start, tokens).clone().requires_grad_()
        return before, last


def fold_steps_only(operation: str, backend: Backend) -> None:
    """Raise for a backend on which the block has no step, as the block does."""
    if backend not in ("reference", "torch"):
        raise no_such_backend(operation, backend)


BTH = Axes(0, 2, 1)
BH = Axes(0, 1)


class AttentionOp(Op):
    """Causal attention, and one query over a cache."""

    AXES: ClassVar = {"q": BTH, "k": BTH, "v": BTH, "y": BTH}
    STEP_AXES: ClassVar = {"q": Axes(0, 2), "k": Axes(0, 2), "v": Axes(0, 2)}
    LIKE_Y = "q"
    config: TransformerConfig

    def inputs(self, B: int, T: int, randn: Randn) -> Tensors:
        """Q (B, T, H, K); k, v (B, T, H_kv, K)."""
        return self._qkv(B, T, T, randn)

    def run(self, inputs: Tensors, backend: Backend, operation: Operation | None = None) -> Tensor:
        """Y (B, T, H, K)."""
        window = self.config.window
        if operation is not None:
            return operation(**inputs, window=window, backend=backend)
        return attention(**inputs, window=window, plan=None, backend=backend)

    def tail(self, inputs: Tensors, tokens: int) -> tuple[Tensors, Tensor]:
        """Directly: the last queries over all the keys that they can see."""
        before, last = self._last(inputs, tokens)
        k, v = (torch.cat((before[name], last[name]), 1) for name in "kv")
        if self.config.window is not None:
            k, v = (x[:, -(tokens + self.config.window - 1) :] for x in (k, v))
        y = attention(last["q"], k, v, window=self.config.window, backend="reference")
        return last, y

    def token(self, B: int, position: int, randn: Randn) -> Tensors:
        """One query, and the keys and values that it reads, its own included."""
        seen = position + 1
        return self._qkv(B, 1, min(seen, self.config.window or seen), randn)

    def step(
        self, token: Tensors, backend: Backend, operation: Operation | None = None
    ) -> tuple[Tensor, ...]:
        """Attention of one query to the cache, written already."""
        return (self.run(token, backend, operation),)

    def _qkv(self, B: int, T: int, S: int, randn: Randn) -> Tensors:
        sizes = {"q": (T, self.config.heads)}
        sizes |= dict.fromkeys("kv", (S, self.config.key_value_heads))
        return {
            name: randn(B, *size, self.config.head_dim).to(self.dtype)
            for name, size in sizes.items()
        }


class SSDOp(Op):
    """State space dual with dt and skip, as Mamba-2's block calls it."""

    AXES: ClassVar = {
        **dict.fromkeys(("x", "log_decay", "b", "c", "dt", "y"), BTH),
        "skip": Axes(heads=0),
    }
    STEP_AXES: ClassVar = {
        **dict.fromkeys(("x", "log_decay", "b", "c", "state", "dt"), BH),
        "skip": Axes(heads=0),
    }
    LIKE_Y = "x"
    config: Mamba2Config

    def inputs(self, B: int, T: int, randn: Randn) -> Tensors:
        """X (B, T, H, P); log_decay, dt (B, T, H); b, c (B, T, G, N); skip (H,)."""
        config = self.config
        # As dt_bias starts: 1e-3 to 0.1.
        dt = F.softplus(randn(B, T, config.heads) - 4).to(self.wide)
        rate = self._rate(dt.device)
        b, c = (randn(B, T, config.groups, config.d_state).to(self.dtype) for _ in range(2))
        return {
            "x": randn(B, T, config.heads, config.head_dim).to(self.dtype),
            "log_decay": rate * dt,
            "b": b,
            "c": c,
            "dt": dt,
            "skip": torch.ones_like(rate, dtype=self.dtype),
        }

    def run(self, inputs: Tensors, backend: Backend, operation: Operation | None = None) -> Tensor:
        """Y (B, T, H, P)."""
        if operation is not None:
            return operation(**inputs, backend=backend)[0]
        return ssd(**inputs, plan=None, backend=backend)[0]

    def express(self, inputs: Tensors) -> Tensors:
        """What `ssd` takes, as a differentiable function of these inputs: themselves."""
        return inputs

    def tail(self, inputs: Tensors, tokens: int) -> tuple[Tensors, Tensor]:
        """The fold from the state that `torch` reaches."""
        before, last = self._last(inputs, tokens)
        weights = {name: x for name, x in inputs.items() if self.AXES[name].tokens is None}
        x, b = before["x"], before["b"]
        start = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[3])
        with torch.no_grad():
            _, state = ssd(**self.express(before), state=start, plan=None, backend="torch")
        inputs = self.express({**last, **weights})
        y, _ = ssd(**inputs, state=state, plan=None, backend="reference")
        return last, y

    def token(self, B: int, position: int, randn: Randn) -> Tensors:
        """One token, and a state (B, H, P, N)."""
        inputs = self.inputs(B, 1, randn)
        token = {name: x if name == "skip" else x.squeeze(1) for name, x in inputs.items()}
        state = randn(*token["x"].shape, self.config.d_state).to(self.wide)
        return {**token, "state": state}

    def step(
        self, token: Tensors, backend: Backend, operation: Operation | None = None
    ) -> tuple[Tensor, ...]:
        """The recurrence; it is no call of `ssd`."""
        if backend == "triton":
            return ssd_step_triton(**token)
        fold_steps_only("mamba2 step", backend)
        return ssd_step(**token)

    def _rate(self, device: torch.device) -> Tensor:
        """A (H,), as A_log may start."""
        config = self.config
        decay = torch.linspace(config.decay_min, config.decay_max, config.heads, device=device)
        return -decay.to(self.wide)


class SSDRateOp(SSDOp):
    """State space dual from the rate A (H,) and dt, of which log_decay is the product.

    The leaves of an implementation that forms log_decay itself. Gradients are then those of A and
    dt, where ours, as Mamba-2's block calls it, has those of log_decay and dt.
    """

    AXES: ClassVar = {
        **{name: axes for name, axes in SSDOp.AXES.items() if name != "log_decay"},
        "rate": Axes(heads=0),
    }

    def inputs(self, B: int, T: int, randn: Randn) -> Tensors:
        """As `SSDOp`, with rate (H,) in place of log_decay."""
        inputs = super().inputs(B, T, randn)
        del inputs["log_decay"]
        return {**inputs, "rate": self._rate(inputs["dt"].device)}

    def run(self, inputs: Tensors, backend: Backend, operation: Operation | None = None) -> Tensor:
        """Y (B, T, H, P); only `operation` is called with these inputs themselves."""
        if operation is None:
            return super().run(self.express(inputs), backend)
        return operation(**inputs, log_decay=None, backend=backend)[0]

    def express(self, inputs: Tensors) -> Tensors:
        """What `ssd` takes: log_decay is rate * dt."""
        others = {name: x for name, x in inputs.items() if name != "rate"}
        return {**others, "log_decay": inputs["rate"] * inputs["dt"]}


class WKV7Op(Op):
    """WKV-7 from decay logits, as RWKV-7's block calls it."""

    AXES: ClassVar = dict.fromkeys(("r", "k", "v", "a", "b", "decay_logits", "y"), BTH)
    STEP_AXES: ClassVar = dict.fromkeys(("r", "k", "v", "a", "b", "decay_logits", "state"), BH)
    LIKE_Y = "v"
    config: RWKV7Config

    def inputs(self, B: int, T: int, randn: Randn) -> Tensors:
        """All (B, T, H, N)."""
        shape = (B, T, self.config.heads, self.config.head_dim)
        removal = F.normalize(randn(*shape), dim=-1)
        activations = {
            "r": randn(*shape),
            "k": randn(*shape),
            "v": randn(*shape),
            "a": -removal,
            "b": removal * torch.sigmoid(randn(*shape)),
        }
        inputs = {name: x.to(self.dtype) for name, x in activations.items()}
        return {**inputs, "decay_logits": randn(*shape).to(self.wide)}

    def run(self, inputs: Tensors, backend: Backend, operation: Operation | None = None) -> Tensor:
        """Y (B, T, H, N)."""
        if operation is not None:
            return operation(**inputs, log_decay=None, backend=backend)[0]
        return wkv7(**inputs, log_decay=None, plan=None, backend=backend)[0]

    def tail(self, inputs: Tensors, tokens: int) -> tuple[Tensors, Tensor]:
        """The fold from the state that `torch` reaches."""
        before, last = self._last(inputs, tokens)
        r, v = before["r"], before["v"]
        start = r.new_zeros(r.shape[0], *r.shape[2:], v.shape[3])
        with torch.no_grad():
            _, state = wkv7(**before, log_decay=None, state=start, plan=None, backend="torch")
        y, _ = wkv7(**last, log_decay=None, state=state, plan=None, backend="reference")
        return last, y

    def token(self, B: int, position: int, randn: Randn) -> Tensors:
        """One token, and a state (B, H, N, N)."""
        token = {name: x.squeeze(1) for name, x in self.inputs(B, 1, randn).items()}
        state = randn(*token["r"].shape, self.config.head_dim).to(self.wide)
        return {**token, "state": state}

    def step(
        self, token: Tensors, backend: Backend, operation: Operation | None = None
    ) -> tuple[Tensor, ...]:
        """The recurrence; it is no call of `wkv7`."""
        if backend == "triton":
            return wkv7_step_triton(**token)
        fold_steps_only("rwkv7 step", backend)
        others = {name: x for name, x in token.items() if name != "decay_logits"}
        return wkv7_step(log_decay=log_decay_of(token["decay_logits"]), **others)


class LongConvOp(Op):
    """Long convolution with gates, skip and short filters, as Hyena's block calls it."""

    BDT = Axes(0, 1, 2)
    AXES: ClassVar = {
        **dict.fromkeys(("u", "pre_gate", "post_gate", "y"), BDT),
        "filter": Axes(heads=0, tokens=1),
        "skip": Axes(heads=0),
        "short_filters": Axes(heads=1),
        "short_bias": Axes(heads=1),
    }
    STEP_AXES: ClassVar = {
        **dict.fromkeys(("u", "history", "pre_gate"), BH),
        **dict.fromkeys(("taps", "skip"), Axes(heads=0)),
    }
    LIKE_Y = "u"
    config: HyenaConfig

    def inputs(self, B: int, T: int, randn: Randn) -> Tensors:
        """u, gates (B, D, T); filter (D, T); skip (D,); short filters (3, D, 3) and bias (3, D)."""
        D = self.config.width
        signals = {name: randn(B, D, T) for name in ("u", "pre_gate", "post_gate")}
        weights = {"skip": randn(D), "short_filters": randn(3, D, 3), "short_bias": randn(3, D)}
        inputs = {name: x.to(self.dtype) for name, x in {**signals, **weights}.items()}
        return {**inputs, "filter": self._filter(T, randn)}

    def run(self, inputs: Tensors, backend: Backend, operation: Operation | None = None) -> Tensor:
        """Y (B, D, T)."""
        if operation is not None:
            return operation(**inputs, backend=backend)
        return long_conv(**inputs, plan=None, backend=backend)

    def tail(self, inputs: Tensors, tokens: int) -> tuple[Tensors, Tensor]:
        """The direct sums of the last tokens over the whole past."""
        names = ("post_gate", "pre_gate", "u")
        signals = {name: inputs[name] for name in names}
        before, last = self._last(signals, tokens)
        weights = list(zip(inputs["short_filters"], inputs["short_bias"], strict=True))
        past, now = [], []
        for name, (taps, bias) in zip(names, weights, strict=True):
            with torch.no_grad():
                y, _ = short_conv(before[name].mT, taps, bias, backend="torch")
            past.append(y.mT)
            y, _ = short_conv(last[name].mT, taps, bias, before[name][..., -2:], backend="torch")
            now.append(y.mT)
        y = long_conv(
            now[2],
            inputs["filter"],
            pre_gate=now[1],
            post_gate=now[0],
            skip=inputs["skip"],
            history=past[1] * past[2],
            backend="reference",
        )
        return last, y

    def token(self, B: int, position: int, randn: Randn) -> Tensors:
        """One token, the reversed taps (D, position + 1) and the history (B, D, position)."""
        D = self.config.width
        inputs = {
            "u": randn(B, D),
            "pre_gate": randn(B, D),
            "skip": randn(D),
            "history": randn(B, D, position + 1)[..., :position],  # with room for this token
        }
        token = {name: x.to(self.dtype) for name, x in inputs.items()}
        return {**token, "taps": self._filter(position + 1, randn).flip(1)}

    def step(
        self, token: Tensors, backend: Backend, operation: Operation | None = None
    ) -> tuple[Tensor, ...]:
        """The direct sum, not a call of `long_conv`; y, and z to append to the history."""
        if backend == "triton":
            return long_conv_step_triton(**token)
        fold_steps_only("hyena step", backend)
        return long_conv_step(**token)

    def extra_flops(self, T: int) -> int:
        """The spectra of the filters: once a call, whatever the batch."""
        return self.config.width * long_conv_flops(T, 0)[1]

    def _filter(self, length: int, randn: Randn) -> Tensor:
        taps = randn(self.config.width, length)
        age = torch.arange(length, device=taps.device) / length
        return (taps * torch.exp(-8 * age)).to(self.wide)


OPS: dict[str, Callable[[Any, torch.dtype], Op]] = {
    "transformer": AttentionOp,
    "mamba2": SSDOp,
    "rwkv7": WKV7Op,
    "hyena": LongConvOp,
}
# Peers (`harness.peers`) that take other leaves than our operation does.
PEER_OPS: dict[str, Callable[[Any, torch.dtype], Op]] = {"mamba_ssm": SSDRateOp}
