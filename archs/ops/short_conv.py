"""Short convolution: a causal depthwise filter of 2 to 4 taps.

The local mixing in front of Mamba-2's SSD (Dao and Gu, arXiv 2405.21060, section 7.1) and of
Hyena's gates (Poli et al., arXiv 2302.10866, section 3.1).

    y_t = act(bias + sum_{i=0}^{W-1} weight_{W-1-i} * x_{t-i}),   x_t = 0 before the first token

The last tap multiplies the current token, as in `nn.Conv1d` with left padding. The state is the
last W - 1 inputs, oldest first. Products are summed in float32 (float64 for float64 input).
Letters: B batch, T tokens, D channels, W taps.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from archs.ops import Backend, in_its_own_types, kernels, no_such_backend

Activation = Literal["silu"] | None


def short_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """One token: x (B, D), state (B, D, W-1) -> y (B, D), state (B, D, W-1)."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([state, x[:, :, None]], dim=2)  # (B, D, W)
    y = (window.to(accumulate) * weight.to(accumulate)).sum(dim=2)  # (B, D)
    if bias is not None:
        y = y + bias.to(accumulate)
    return _activate(y, activation).to(x.dtype), window[:, :, 1:].contiguous()


def short_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """The fold of `short_conv_step` over time: x (B, T, D), state (B, D, W-1)."""
    ys = []
    for x_t in x.unbind(1):
        y_t, state = short_conv_step(x_t, weight, bias, state, activation)
        ys.append(y_t)
    return torch.stack(ys, dim=1), state


def short_conv_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor | None]:
    """W shifted products, which read the (B, T, D) layout as it lies; arguments as `short_conv`."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    past = 0 if state is None else state.shape[2]
    inputs = x if state is None else torch.cat([state.transpose(1, 2), x], dim=1)  # (B, W-1+T, D)
    bias = None if bias is None else bias.to(accumulate)
    y = _ShiftedSum.apply(inputs.to(accumulate), weight.to(accumulate), bias)[:, past:]
    y = _activate(y, activation).to(x.dtype)
    if state is None:
        return y, None
    # A copy: a view would keep all T inputs alive for as long as the state lives.
    tail = inputs[:, -past:].transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return y, tail


def short_conv_step_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """`short_conv_step` as a Triton kernel."""
    return kernels("short_conv", x).short_conv_step_triton(x, weight, bias, state, activation)


@in_its_own_types
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    activation: Activation = None,
    backend: Backend,
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution over time.

    Args:
        x: (B, T, D), T >= 1.
        weight: (D, W), W in 2..4; weight[:, -1] multiplies the current token.
        bias: (D,).
        state: (B, D, W-1), the inputs before x, oldest first, in x's dtype; None means zeros.
        activation: None or "silu", applied to the sum.
        backend: "reference", "torch" or "triton".

    Returns:
        y (B, T, D) in x's dtype, and the state after x exactly when one was passed in.

    Raises:
        ValueError: shapes or types do not fit, or the activation or backend is unknown.
        BackendUnavailableError: the backend cannot run here.
    """
    _validate(x, weight, bias, state, activation)
    if backend == "reference":
        B, _, D = x.shape
        start = x.new_zeros(B, D, weight.shape[1] - 1) if state is None else state
        y, end = short_conv_reference(x, weight, bias, start, activation)
        return y, None if state is None else end
    if backend == "torch":
        return short_conv_torch(x, weight, bias, state, activation)
    if backend == "triton":
        kernel = kernels("short_conv", x)
        return kernel.short_conv_triton(x, weight, bias, state, activation)
    raise no_such_backend("short_conv", backend)


def _activate(y: Tensor, activation: Activation) -> Tensor:
    return F.silu(y) if activation == "silu" else y


class _ShiftedSum(torch.autograd.Function):
    """y_t = bias + sum_i weight_{W-1-i} * x_{t-i}, with zeros before the first token.

    Plain autograd would allocate and zero-fill a whole x for the gradient of every shifted slice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        T, W = x.shape[1], weight.shape[1]
        taps = weight.t().flip(0).contiguous()  # (W, D), the current token's first
        y = x * taps[0] if bias is None else torch.addcmul(bias, x, taps[0])  # (B, T, D)
        for i in range(1, min(W, T)):
            y[:, i:].addcmul_(x[:, : T - i], taps[i])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        T, W = x.shape[1], weight.shape[1]
        taps = weight.t().flip(0).contiguous()  # (W, D)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dy * taps[0]  # (B, T, D)
            for i in range(1, min(W, T)):
                dx[:, : T - i].addcmul_(dy[:, i:], taps[i])
        if ctx.needs_input_grad[1]:
            dweight = torch.zeros_like(weight)  # (D, W)
            for i in range(min(W, T)):
                dweight[:, W - 1 - i] = (dy[:, i:] * x[:, : T - i]).sum(dim=(0, 1))
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = dy.sum(dim=(0, 1))  # (D,)
        return dx, dweight, dbias


def _validate(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: Activation
) -> None:
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"short_conv: x must be (B, T, D) with T >= 1, got {tuple(x.shape)}")
    B, _, D = x.shape
    if weight.ndim != 2 or weight.shape[0] != D or not 2 <= weight.shape[1] <= 4:
        raise ValueError(
            f"short_conv: weight must be (D, W) with D = {D} and W in 2..4, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"short_conv: bias must be (D,) = ({D},), got {tuple(bias.shape)}")
    if state is not None:
        expected = (B, D, weight.shape[1] - 1)
        if state.shape != expected:
            raise ValueError(
                f"short_conv: state must be (B, D, W-1) = {expected}, got {tuple(state.shape)}"
            )
        if state.dtype != x.dtype:
            raise ValueError(f"short_conv: state must have x's dtype {x.dtype}, got {state.dtype}")
    if activation not in (None, "silu"):
        raise ValueError(f"short_conv: activation must be None or 'silu', got {activation!r}")
