"""Long convolution: a causal filter as long as the sequence, gated before and after.

The operation inside Hyena (Poli et al., arXiv 2302.10866, section 3), in O(T log T) by FFT, with
the gates, the skip and the short convolutions that its official code puts around it:

    a, b, v = post_gate, pre_gate, u, each first convolved with its 3 short_filters taps, if given
    z_t = b_t * v_t
    y_t = a_t * (sum_{s<=t} filter_{t-s} z_s + skip * z_t)

Everything is channel by channel; a gate that is not given is 1. `history` is z before u's first
token. It grows with the sequence: an implicit filter has no state of constant size. Computed in
float32 (float64 for float64 input) whatever the input's type.
Letters: B batch, D channels, T tokens, S earlier tokens, L filter taps, C channels of a segment,
N length of the FFT.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from archs.ops import Backend, BackendUnavailableError, in_its_own_types, kernels, no_such_backend
from archs.ops.long_conv_tables import MOST_TOKENS, TILE_TOKENS
from archs.ops.plan import multiprocessors
from archs.ops.short_conv import short_conv_reference

# Bytes of padded signals that one FFT call works on: the fastest of 1 to 32 MiB on a CPU at
# T = 4,096 to 131,072. Smaller calls pay more for planning their transform; from 32 MiB on, the
# largest mmap threshold of glibc's malloc, every temporary is mapped anew, page by page.
SEGMENT_BYTES = 16 * 2**20


class LongConvPlan(NamedTuple):
    """Which variant of the Triton kernels runs."""

    splits: int = 1  # parts of the batch, each with programs of its own, to 4,096 tokens
    precision: Literal["accurate", "fast"] = "accurate"  # see `archs.ops.long_conv_kernel`


def plan(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str
) -> LongConvPlan:
    """The plan for u of a shape (B, D, T) and type.

    "fast" where its error is within that of rounding the result: in bfloat16, and in float32 where
    `torch.set_float32_matmul_precision` allows tf32. As many splits as give every multiprocessor a
    program; each forms the filter's transform anew. More tokens than a tile has need no splits.
    Arithmetic, not measured.
    """
    B, D, T = shape
    splits = 1 if T > TILE_TOKENS else min(B, max(1, multiprocessors(device) // D))
    rounds = dtype == torch.bfloat16
    rounds |= dtype == torch.float32 and _tf32_is_allowed()
    return LongConvPlan(splits, "fast" if rounds else "accurate")


def _tf32_is_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# `torch.compile` cannot trace it, and compiles anew where the setting changes.
_tf32_is_allowed._dynamo_marked_constant = True


def long_conv_step(
    u: Tensor,
    taps: Tensor,
    history: Tensor,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token, by the direct dot over the history: O(S).

    Args:
        u: (B, D).
        taps: (D, S+1), the filter's first S+1 taps reversed: like the history, oldest first.
        history: (B, D, S), z so far.
        pre_gate: (B, D).
        post_gate: (B, D).
        skip: (D,).

    Returns:
        y (B, D), and the new z (B, D) to append to the history, both in u's type.
    """
    compute = torch.promote_types(u.dtype, torch.float32)
    taps = taps.to(compute)
    z = u.to(compute) if pre_gate is None else u.to(compute) * pre_gate.to(compute)
    # (D, 1, S) times (D, S, B): on a CPU at the speed of reading, where other orders are not.
    past = torch.bmm(taps[:, :-1].unsqueeze(1), history.to(compute).permute(1, 2, 0))  # (D, 1, B)
    y = past.squeeze(1).T + taps[:, -1] * z
    if skip is not None:
        y = y + skip.to(compute) * z
    if post_gate is not None:
        y = y * post_gate.to(compute)
    return y.to(u.dtype), z.to(u.dtype)


def long_conv_reference(
    u: Tensor,
    filter: Tensor,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    skip: Tensor | None = None,
    short_filters: Tensor | None = None,
    short_bias: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """Fold of `long_conv_step` over the T tokens; arguments and result as in `long_conv`."""
    B, D, T = u.shape
    compute = torch.promote_types(u.dtype, torch.float32)
    # Converted before the fold: a gradient summed over T tokens is then summed in that type.
    whole = _Tensors(
        *(
            None if x is None else x.to(compute)
            for x in (u, filter, pre_gate, post_gate, skip, short_filters, short_bias, history)
        )
    )
    signals: list[Any] = [whole.post_gate, whole.pre_gate, whole.u]
    if whole.short_filters is not None:
        start = whole.u.new_zeros(B, D, 2)
        biases = [None] * 3 if whole.short_bias is None else whole.short_bias.unbind(0)
        signals = [
            short_conv_reference(x.transpose(1, 2), w, bias, start, None)[0].transpose(1, 2)
            for x, w, bias in zip(signals, whole.short_filters.unbind(0), biases, strict=True)
        ]
    tokens: list[Any] = [[None] * T if x is None else x.unbind(2) for x in signals]
    seen = whole.u.new_zeros(B, D, 0) if whole.history is None else whole.history
    reversed_filter = whole.filter.flip(1)
    ys = []
    for post, pre, u_t in zip(*tokens, strict=True):
        taps = reversed_filter[:, -(seen.shape[2] + 1) :]  # (D, S+t+1)
        y_t, z_t = long_conv_step(u_t, taps, seen, pre_gate=pre, post_gate=post, skip=whole.skip)
        seen = torch.cat([seen, z_t.unsqueeze(2)], 2)
        ys.append(y_t)
    return torch.stack(ys, 2).to(u.dtype)


def long_conv_torch(
    u: Tensor,
    filter: Tensor,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    skip: Tensor | None = None,
    short_filters: Tensor | None = None,
    short_bias: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """By FFT, a segment of channels at a time; arguments and result as in `long_conv`.

    For the backward pass it keeps its inputs and, where there is a post_gate, what that gate
    multiplied; spectra are formed again. Temporary memory is a few times `SEGMENT_BYTES`, or what
    one channel takes where that is more.
    """
    keep = torch.is_grad_enabled() and post_gate is not None
    seen = u.shape[2] if history is None else u.shape[2] + history.shape[2]
    taps = filter[:, :seen]
    return _LongConv.apply(
        keep, u, taps, pre_gate, post_gate, skip, short_filters, short_bias, history
    )


def long_conv_triton(
    u: Tensor,
    filter: Tensor,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    skip: Tensor | None = None,
    short_filters: Tensor | None = None,
    short_bias: Tensor | None = None,
    history: Tensor | None = None,
    chosen: LongConvPlan | None = None,
) -> Tensor:
    """Our Triton kernels; arguments and result as in `long_conv`, `chosen` its plan.

    With a history the gates are applied before and after the kernel, not within.
    """
    module = kernels("long_conv", u)
    if history is not None:
        z = u if pre_gate is None else u * pre_gate
        z = torch.cat([history, z], 2)
        y = long_conv_triton(z, filter, skip=skip, chosen=chosen)[:, :, history.shape[2] :]
        return y if post_gate is None else y * post_gate
    B, D, T = u.shape
    chosen = plan((B, D, T), u.dtype, u.device) if chosen is None else chosen
    if chosen.splits < 1 or chosen.precision not in ("accurate", "fast"):
        raise ValueError(
            "long_conv: a plan has one split at least, and precision 'accurate' or 'fast', got "
            f"{chosen}"
        )
    if T > MOST_TOKENS:
        raise BackendUnavailableError(
            f"long_conv: backend 'triton' has kernels for up to {MOST_TOKENS:,} tokens, got "
            f"{T:,}: use backend='torch'"
        )
    accurate = chosen.precision == "accurate"
    tensors = (u, filter[:, :T], pre_gate, post_gate, skip, short_filters, short_bias)
    return module.long_conv_op(*tensors, chosen.splits, accurate)


def long_conv_step_triton(
    u: Tensor,
    taps: Tensor,
    history: Tensor,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`long_conv_step` as one Triton kernel."""
    module = kernels("long_conv", u)
    return module.long_conv_step_op(u, taps, history, pre_gate, post_gate, skip)


def fft_length(new_tokens: int, context: int = 0) -> int:
    """The smallest even 5-smooth N at which nothing that wraps around reaches a wanted value.

    Signal and filter have S + T values, and only the last T outputs are wanted: S + 2 T - 1 is
    enough, also for the correlations of the backward pass.
    """
    half = (context + 2 * new_tokens) // 2
    while True:
        rest = half
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return 2 * half
        half += 1


@in_its_own_types
def long_conv(
    u: Tensor,
    filter: Tensor,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    skip: Tensor | None = None,
    short_filters: Tensor | None = None,
    short_bias: Tensor | None = None,
    history: Tensor | None = None,
    plan: LongConvPlan | None = None,
    backend: Backend,
) -> Tensor:
    """Gated causal convolution of every channel with a filter as long as the sequence.

    The layout is (B, D, T), so that a channel lies in contiguous memory.

    Args:
        u: (B, D, T), T >= 1.
        filter: (D, L), L >= S + T; filter[:, 0] multiplies the current token.
        pre_gate: (B, D, T), multiplies u before the convolution.
        post_gate: (B, D, T), multiplies the result.
        skip: (D,), weight of the convolution's input in its result, before post_gate.
        short_filters: (3, D, 3), taps of short causal convolutions over post_gate, pre_gate and
            u, in this order, the last tap on the current token. Needs both gates.
        short_bias: (3, D), added to the short convolutions.
        history: (B, D, S), the convolution's input (pre_gate * u) before u's first token.
        plan: the variant of the Triton kernels; None means what `archs.ops.long_conv.plan` chooses.
        backend: "reference", "torch" or "triton" (for its precision see
            `archs.ops.long_conv_kernel`).

    Returns:
        y (B, D, T) in u's type.

    Raises:
        ValueError: shapes or types do not fit, short_filters together with history (the short
            convolutions would need a history of their own), or the backend is unknown, or has no
            plans.
        BackendUnavailableError: the backend cannot run here.
    """
    tensors = _Tensors(u, filter, pre_gate, post_gate, skip, short_filters, short_bias, history)
    _validate(tensors)
    if backend == "triton":
        return long_conv_triton(**tensors._asdict(), chosen=plan)
    if plan is not None:
        raise ValueError(f"long_conv: plan is for backend 'triton', got backend {backend!r}")
    if backend == "reference":
        return long_conv_reference(**tensors._asdict())
    if backend == "torch":
        return long_conv_torch(**tensors._asdict())
    raise no_such_backend("long_conv", backend)


class _Tensors(NamedTuple):
    """The tensors that `long_conv` takes, or their gradients; None where there is none."""

    u: Any  # (B, D, T)
    filter: Any  # (D, L)
    pre_gate: Any  # (B, D, T)
    post_gate: Any  # (B, D, T)
    skip: Any  # (D,)
    short_filters: Any  # (3, D, 3)
    short_bias: Any  # (3, D)
    history: Any  # (B, D, S)

    def channels(self, start: int, size: int) -> "_Tensors":
        """Views of C channels, moved to the front: u (C, B, T), short_filters (C, 3, 3)."""
        axes = (1, 0, 1, 1, 0, 1, 1, 1)
        views = (
            None if x is None else x.narrow(axis, start, size).movedim(axis, 0)
            for x, axis in zip(self, axes, strict=True)
        )
        return _Tensors(*views)

    def sizes(self) -> tuple[int, int, int, int]:
        """B, S, T and N."""
        B, _, T = self.u.shape
        S = 0 if self.history is None else self.history.shape[2]
        return B, S, T, fft_length(T, S)


class _LongConv(torch.autograd.Function):
    """Both directions, segment by segment.

    Plain autograd would keep every spectrum, and its gradient of a real FFT of length N is a
    complex FFT of length N.
    """

    @staticmethod
    def forward(ctx: Any, keep: bool, *tensors: Tensor | None) -> Tensor:
        whole = _Tensors(*tensors)
        B, S, T, N = whole.sizes()
        y = torch.empty_like(whole.u)
        kept = torch.empty_like(y, dtype=_compute_type(y)) if keep else None
        for start, size, padded in _segments(whole, rows=B + 1):
            part = whole.channels(start, size)
            post, _, _, z = _load(part, padded, B, S, T)
            spectra = torch.fft.rfft(padded)  # (C, B+1, N/2+1)
            conv = torch.fft.irfft(spectra[:, :B] * spectra[:, B:], N)[:, :, S : S + T]  # (C, B, T)
            if part.skip is not None:
                conv.addcmul_(z, part.skip[:, None, None].to(z.dtype))
            if kept is not None:
                kept.narrow(1, start, size).copy_(conv.transpose(0, 1))
            if post is not None:
                conv.mul_(post)
            y.narrow(1, start, size).copy_(conv.transpose(0, 1))
        ctx.save_for_backward(*tensors, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        whole = _Tensors(*tensors)
        B, S, T, N = whole.sizes()
        gradients = _Tensors(
            *(
                torch.empty_like(x) if needed else None
                for x, needed in zip(whole, ctx.needs_input_grad[1:], strict=True)
            )
        )
        for start, size, padded in _segments(whole, rows=2 * B + 1):
            part, gradient = whole.channels(start, size), gradients.channels(start, size)
            post, pre, u, z = _load(part, padded, B, S, T)
            d_y = dy.narrow(1, start, size).transpose(0, 1).to(z.dtype)  # (C, B, T)
            d_conv = _gated_into(padded[:, B + 1 :, S : S + T], d_y, post)

            # The adjoint of a convolution is a correlation: the other factor is conjugated.
            spectra = torch.fft.rfft(padded)  # (C, 2B+1, N/2+1)
            spectra[:, : B + 1].conj_physical_()
            seen, taps, output = spectra.split([B, 1, B], 1)
            products = torch.empty_like(spectra[:, : B + 1])
            torch.mul(output, taps, out=products[:, :B])
            torch.mul(output[:, 0], seen[:, 0], out=products[:, B])
            for b in range(1, B):
                products[:, B].addcmul_(output[:, b], seen[:, b])
            correlations = torch.fft.irfft(products, N)[:, :, : S + T]
            d_seen, d_filter = correlations[:, :B], correlations[:, B]  # (C, B, S+T), (C, S+T)

            d_z = d_seen[:, :, S:]
            if part.skip is not None:
                _put(gradient.skip, (d_conv * z).sum((1, 2)))
                d_z.addcmul_(d_conv, part.skip[:, None, None].to(z.dtype))
            d_signals: list[Any] = [
                None if kept is None else d_y * kept.narrow(1, start, size).transpose(0, 1),
                None if pre is None else d_z * u,
                d_z if pre is None else d_z * pre,
            ]
            if part.short_filters is not None:
                d_signals = [_short_backward(i, part, gradient, d) for i, d in enumerate(d_signals)]
            _put(gradient.post_gate, d_signals[0])
            _put(gradient.pre_gate, d_signals[1])
            _put(gradient.u, d_signals[2])
            _put(gradient.filter, d_filter)
            _put(gradient.history, d_seen[:, :, :S])
        return None, *gradients


def _compute_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _segments(whole: _Tensors, rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """First channel and number C of channels of each segment, and (C, rows, N) to fill for it.

    What a segment leaves unwritten there is zero, as every segment writes the same places.
    """
    D, N = whole.u.shape[1], whole.sizes()[3]
    compute = _compute_type(whole.u)
    most = max(1, SEGMENT_BYTES // (rows * N * compute.itemsize))
    even = -(-D // -(-D // most))
    padded = whole.u.new_zeros(even, rows, N, dtype=compute)
    for start in range(0, D, even):
        size = min(even, D - start)
        yield start, size, padded[:size]


def _load(
    part: _Tensors, padded: Tensor, B: int, S: int, T: int
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Both gates and u after their short convolutions, and z: all (C, B, T).

    Writes history and z (which is a view) into the first B rows of `padded`, the filter into the
    next.
    """
    signals: list[Any] = [
        None if x is None else x.to(padded.dtype) for x in (part.post_gate, part.pre_gate, part.u)
    ]
    if part.short_filters is not None:
        signals = [_short_forward(i, part, x) for i, x in enumerate(signals)]
    post, pre, u = signals
    z = _gated_into(padded[:, :B, S : S + T], u, pre)
    if part.history is not None:
        padded[:, :B, :S] = part.history
    padded[:, B, : S + T] = part.filter
    return post, pre, u, z


def _gated_into(out: Tensor, x: Tensor, gate: Tensor | None) -> Tensor:
    return out.copy_(x) if gate is None else torch.mul(x, gate, out=out)


def _short_forward(i: int, part: _Tensors, x: Tensor) -> Tensor:
    """Short convolution number i of a segment: x (C, B, T) -> (C, B, T)."""
    w = part.short_filters[:, i].to(x.dtype).T[..., None, None]  # (3, C, 1, 1)
    y = x * w[2]
    if part.short_bias is not None:
        y += part.short_bias[:, i, None, None]
    y[..., 1:].addcmul_(x[..., :-1], w[1])
    y[..., 2:].addcmul_(x[..., :-2], w[0])
    return y


def _short_backward(i: int, part: _Tensors, gradient: _Tensors, dy: Tensor) -> Tensor:
    """The gradient of its input; puts those of its taps and bias into `gradient`."""
    T = dy.shape[2]
    x = (part.post_gate, part.pre_gate, part.u)[i]  # (C, B, T)
    w = part.short_filters[:, i].to(dy.dtype).T[..., None, None]  # (3, C, 1, 1)
    if gradient.short_filters is not None:
        for tap in range(3):
            age = 2 - tap
            product = dy[..., age:] * x[..., : max(0, T - age)]
            gradient.short_filters[:, i, tap] = product.sum((1, 2))
    if gradient.short_bias is not None:
        gradient.short_bias[:, i] = dy.sum((1, 2))
    dx = dy * w[2]
    dx[..., :-1].addcmul_(dy[..., 1:], w[1])
    dx[..., :-2].addcmul_(dy[..., 2:], w[0])
    return dx


def _put(target: Tensor | None, value: Tensor | None) -> None:
    if target is not None and value is not None:
        target.copy_(value)


def _validate(tensors: _Tensors) -> None:
    u, filter, pre_gate, post_gate, skip, short_filters, short_bias, history = tensors
    if u.ndim != 3 or u.shape[2] < 1:
        raise ValueError(f"long_conv: u must be (B, D, T) with T >= 1, got {tuple(u.shape)}")
    B, D, T = u.shape
    if short_filters is not None and history is not None:
        raise ValueError(
            "long_conv: short_filters cannot be fused with history, as a short convolution needs "
            "its own tail: apply short_conv first"
        )
    if short_filters is not None and (pre_gate is None or post_gate is None):
        raise ValueError("long_conv: short_filters need pre_gate and post_gate")
    if short_bias is not None and short_filters is None:
        raise ValueError("long_conv: short_bias needs short_filters")
    expected = {
        "pre_gate": (pre_gate, (B, D, T)),
        "post_gate": (post_gate, (B, D, T)),
        "skip": (skip, (D,)),
        "short_filters": (short_filters, (3, D, 3)),
        "short_bias": (short_bias, (3, D)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"long_conv: {name} must be {shape}, got {tuple(x.shape)}")
    if history is not None and (history.ndim != 3 or history.shape[:2] != (B, D)):
        raise ValueError(
            f"long_conv: history must be (B, D, S) = ({B}, {D}, S), got {tuple(history.shape)}"
        )
    seen = T if history is None else T + history.shape[2]
    if filter.ndim != 2 or filter.shape[0] != D or filter.shape[1] < seen:
        raise ValueError(
            f"long_conv: filter must be (D, L) with D = {D} and L >= {seen} tokens of history and "
            f"u, got {tuple(filter.shape)}"
        )
    for name, x in (("pre_gate", pre_gate), ("post_gate", post_gate), ("history", history)):
        if x is not None and x.dtype != u.dtype:
            raise ValueError(f"long_conv: {name} must have u's dtype {u.dtype}, got {x.dtype}")
