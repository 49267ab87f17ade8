"""Whether what is timed is right: the error of a timed call's result, on the timed tensors.

The reference is the fold of the step in float64, over the first tokens of one batch row (every
architecture is causal: a prefix does not depend on what follows) and, at the level of the op, over
the last tokens from the state that the `torch` form reaches in float64. A reference whose tensors
do not change is formed once, by the first call of a check, so that an operation which damages its
inputs is found by the second.

Every check returns a relative RMS error, NaN where anything timed is not finite.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from archs.block import Block, recurrent_dtype
from archs.ops import Backend
from harness.op_inputs import Axes, Op, Tensors
from harness.subjects import Subject

Check = Callable[[], float]

# Relative RMS error that a timed result may have, by type of its inputs.
ALLOWED_ERROR = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}

# Tokens that are folded: enough to cross every chunk, few enough for a Python step each.
OP_PREFIX, OP_TAIL = 256, 64
OP_GRADIENT_PREFIX, OP_GRADIENT_TAIL = 96, 32
PREFIX = 48  # of a block or a model
GRADIENT_PREFIX = 32


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Relative RMS difference; 0 where both are zero, NaN where one is not finite."""
    if got.shape != expected.shape:
        raise ValueError(f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    expected = expected.detach().double()
    difference = torch.linalg.vector_norm(got.detach().double() - expected).item()
    size = torch.linalg.vector_norm(expected).item()
    if not math.isfinite(difference) or not math.isfinite(size):
        return math.nan
    if size == 0:
        return math.inf if difference else 0.0
    return difference / size


def error_in_part(whole: Tensor, part: Tensor, expected: Tensor) -> float:
    """The error of `part`, a view of `whole`, where all of `whole` outside it should be zero.

    Writes into `whole`.
    """
    error, size = relative_error(part, expected), torch.linalg.vector_norm(expected).item()
    part.zero_()
    # In float32 at least, and without a copy of what may be a long sequence's gradient.
    outside = torch.linalg.vector_norm(whole, dtype=recurrent_dtype(whole.dtype)).item()
    if outside == 0:
        return error
    return math.nan if math.isnan(outside) or size == 0 else math.hypot(error, outside / size)


def worst(errors: Iterable[float]) -> float:
    """The largest error, or NaN if there is one."""
    errors = list(errors)
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def not_finite(tensors: Iterable[Tensor | None]) -> float:
    """NaN if any of the tensors holds NaN or infinity, else 0."""
    return 0.0 if all(t is None or bool(t.isfinite().all()) for t in tensors) else math.nan


# Op level: the last row; of heads, groups or channels the first and the last.


def selected(x: Tensor, axes: Axes, start: int = 0, stop: int | None = None) -> Tensor:
    """A view of the checked row and heads of x, from token `start` to `stop`."""
    index = [slice(None)] * x.ndim
    if axes.batch is not None:
        index[axes.batch] = slice(x.shape[axes.batch] - 1, None)
    if axes.heads is not None:
        index[axes.heads] = slice(None, None, max(1, x.shape[axes.heads] - 1))
    if axes.tokens is not None:
        index[axes.tokens] = slice(start, stop)
    return x[tuple(index)]


def selection(
    tensors: Tensors,
    axes: Mapping[str, Axes],
    dtype: torch.dtype,
    *,
    stop: int | None = None,
    gradients: bool = False,
) -> Tensors:
    """Copies, in `dtype`, of the checked part of every tensor; the cut comes first."""
    return {
        name: selected(x.detach(), axes[name], 0, stop)
        .to(dtype, copy=True)
        .contiguous()
        .requires_grad_(gradients)
        for name, x in tensors.items()
    }


def check_op_forward(
    op: Op, inputs: Tensors, backend: str, function: Callable[[], Tensor]
) -> Check:
    """The first and last tokens against the fold; a kernel also against `torch`.

    That last comparison is at full length, in float32 at least: a kernel may go wrong anywhere.
    `backend` is one of ours, or the name of a peer, which counts as a kernel.
    """
    T = tokens_of(op, inputs)
    tail = min(OP_TAIL, T - OP_PREFIX)

    @cache
    @torch.no_grad()
    def expected() -> list[tuple[int, Tensor]]:
        parts = [
            (0, op.run(selection(inputs, op.AXES, torch.float64, stop=OP_PREFIX), "reference"))
        ]
        if tail > 0:
            parts.append((T - tail, op.tail(selection(inputs, op.AXES, torch.float64), tail)[1]))
        if is_kernel(backend):
            parts.append((0, op.run(selection(inputs, op.AXES, comparison_type(op)), "torch")))
        return parts

    def check() -> float:
        parts = expected()
        y = function()
        errors = [not_finite([y])]
        for start, part in parts:
            stop = start + part.shape[tokens_axis(op)]
            errors.append(relative_error(selected(y, op.AXES["y"], start, stop), part))
        return worst(errors)

    return check


def check_op_backward(
    op: Op,
    leaves: Tensors,
    y: Tensor,
    cotangent: Tensor,
    backend: str,
    function: Callable[[], tuple[Tensor, ...]],
) -> Check:
    """Gradients against those of the fold.

    The timed call's own, at the last tokens, for inputs that no other head shares. Then, through
    the timed graph, those of a cotangent that is zero but for the first tokens of the checked row
    and heads: exact there, zero everywhere else. A kernel is also compared with `torch`, at full
    length.
    """
    T = tokens_of(op, leaves)
    tail = min(OP_GRADIENT_TAIL, T - OP_GRADIENT_PREFIX)
    own = [name for name in leaves if is_own(op, leaves, name)]

    @cache
    def expected_tail() -> Tensors:
        inputs = selection(leaves, op.AXES, torch.float64)
        last, y_last = op.tail(inputs, tail)
        seed = selected(cotangent, op.AXES["y"], T - tail).double()
        names = [name for name in own if name in last]
        return dict(zip(names, gradients_of(y_last, last, names, seed), strict=True))

    @cache
    def expected_masked() -> list[tuple[int, Tensors]]:
        spans: list[tuple[int, Backend, torch.dtype]] = [
            (min(T, OP_GRADIENT_PREFIX), "reference", torch.float64)
        ]
        if is_kernel(backend):
            spans.append((T, "torch", comparison_type(op)))
        parts = []
        for stop, other, dtype in spans:
            inputs = selection(leaves, op.AXES, dtype, stop=stop, gradients=True)
            seed = selected(cotangent, op.AXES["y"], 0, stop).to(dtype)
            wanted = gradients_of(op.run(inputs, other), inputs, list(inputs), seed.to(dtype))
            parts.append((stop, dict(zip(inputs, wanted, strict=True))))
        return parts

    def check() -> float:
        last = expected_tail() if tail > 0 else {}
        spans = expected_masked()
        timed = dict(zip(leaves, function(), strict=True))
        errors = [not_finite(timed.values())]
        errors += [
            relative_error(selected(timed[name], op.AXES[name], T - tail), wanted)
            for name, wanted in last.items()
        ]
        del timed
        for stop, wanted in spans:
            masked = torch.zeros_like(cotangent)
            selected(masked, op.AXES["y"], 0, stop).copy_(
                selected(cotangent, op.AXES["y"], 0, stop)
            )
            grads = torch.autograd.grad(y, list(leaves.values()), masked, retain_graph=True)
            for (name, part), got in zip(wanted.items(), grads, strict=True):
                errors.append(error_in_part(got, selected(got, op.AXES[name], 0, stop), part))
        return worst(errors)

    return check


def check_op_decode(
    op: Op, token: Tensors, backend: str, function: Callable[[], tuple[Tensor, ...]]
) -> Check:
    """Every result against the step in float64 on the same state."""

    @cache
    @torch.no_grad()
    def expected() -> tuple[Tensor, ...]:
        return op.step(selection(token, op.STEP_AXES, torch.float64), "reference")

    def check() -> float:
        wanted = expected()
        got = function()
        # A result after y, the next state, has its heads second, as has y but for attention.
        axes = [op.STEP_AXES[op.LIKE_Y], *[Axes(0, 1)] * (len(got) - 1)]
        errors = [not_finite(got)]
        for x, where, part in zip(got, axes, wanted, strict=True):
            errors.append(relative_error(selected(x, where), part))
        return worst(errors)

    return check


def gradients_of(y: Tensor, leaves: Tensors, names: list[str], seed: Tensor) -> tuple[Tensor, ...]:
    """Gradients of y . seed with respect to the named leaves."""
    return torch.autograd.grad(y, [leaves[name] for name in names], seed)


def tokens_axis(op: Op) -> int:
    """The axis of y's tokens."""
    axis = op.AXES["y"].tokens
    assert axis is not None
    return axis


def tokens_of(op: Op, inputs: Tensors) -> int:
    """T."""
    return inputs[op.LIKE_Y].shape[tokens_axis(op)]


def is_own(op: Op, inputs: Tensors, name: str) -> bool:
    """Whether an input has as many heads as y: its gradient sums over no others."""
    y, axis = inputs[op.LIKE_Y], op.AXES[name].heads
    y_axis = op.AXES["y"].heads
    assert axis is not None
    assert y_axis is not None
    return inputs[name].shape[axis] == y.shape[y_axis]


def is_kernel(backend: str) -> bool:
    """Whether a backend or peer is neither the definition nor our plain PyTorch."""
    return backend not in ("reference", "torch")


def comparison_type(op: Op) -> torch.dtype:
    """The type in which `torch` runs beside another backend: float32, or float64 for float64."""
    return op.wide


# Blocks and models: the step is the definition.


def check_forward(subject: Subject, function: Callable[[], Tensor]) -> Check:
    """The first tokens' outputs against the fold of the step."""

    # With gradients recorded, Hyena forms only the taps that these tokens read.
    @cache
    @torch.enable_grad()
    def expected() -> Tensor:
        return subject.in_float64(PREFIX).fold().detach()

    def check() -> float:
        wanted = expected()
        y = function()
        return worst([not_finite([y]), relative_error(y[-1:, : wanted.shape[1]], wanted)])

    return check


def check_backward(
    subject: Subject, outputs: Tensor, function: Callable[[], Iterable[Tensor | None]]
) -> Check:
    """The retained graph: its outputs, and the gradient of the first tokens, against the fold's."""

    @cache
    def expected() -> tuple[Tensor, Tensor]:
        return folded(subject.in_float64(GRADIENT_PREFIX))

    def check() -> float:
        wanted = expected()
        return worst([not_finite(function()), prefix_error(subject, outputs, *wanted)])

    return check


def check_train_step(subject: Subject) -> Check:
    """The step's forward and backward, as they are now, without its optimiser.

    So a check leaves parameters, moments and gradients alone: the timed steps are the only ones
    that move them. The parameters move between checks, so the reference is formed anew.
    """

    def check() -> float:
        expected = folded(subject.in_float64(GRADIENT_PREFIX))
        with torch.enable_grad():
            outputs = subject.forward()
        return prefix_error(subject, outputs, *expected)

    return check


def check_prefill(
    subject: Subject, function: Callable[[], tuple[Tensor, Any]], max_len: int
) -> Check:
    """Outputs, and that of the next token from the state, twice.

    The first tokens alone are read by the timed module and compared with the fold; the timed call
    itself is compared with the fold where it is as short, else with `torch` in float64 and a step.
    """
    T = subject.inputs.shape[1]
    length = min(T, PREFIX)

    @cache
    @torch.no_grad()
    def expected() -> tuple[Tensor, Tensor, Tensor]:
        short = subject.in_float64(length).fold(and_following=True)
        if length == T:
            return short, short[:, :T], short[:, T]
        whole = subject.in_float64(None, "torch")
        y, state = whole.prefill(max_len)
        for block in whole.blocks():
            block.backend = "reference"
        return short, y, whole.step(whole.following, state)[0]

    @torch.no_grad()
    def check() -> float:
        short, whole, after = expected()
        part = subject.last_row(length)
        y, state = part.prefill(length + 1)
        errors = [relative_error(y, like(y, short[:, :length]))]
        errors.append(relative_error(stepped(part, state), short[:, length]))
        y, state = function()
        errors += [not_finite([y]), relative_error(y[-1:], like(y, whole))]
        errors.append(relative_error(stepped(subject, state)[-1:], after))
        return worst(errors)

    return check


def stepped(subject: Subject, state: Any) -> Tensor:
    """Outputs of the token that follows, from a state that the timed module returned.

    A kernel's state is read by the step of `torch`: on its own backend a block may have none.
    """
    kernels: list[tuple[Block, Backend]] = [
        (block, block.backend) for block in subject.blocks() if is_kernel(block.backend)
    ]
    for block, _ in kernels:
        block.backend = "torch"
    try:
        return subject.step(subject.following, state)[0]
    finally:
        for block, backend in kernels:
            block.backend = backend


def check_decode(
    subject: Subject, state: Any, function: Callable[[], tuple[Tensor, Any]], max_len: int
) -> Check:
    """The output, and what the step changes of the state, against the step in float64.

    Only what a step changes is compared: beside a long cache a wrong slot would not show. Every
    check starts from a copy of the state as it then is, since the call may consume it.
    """
    one = subject.init_state(1, max_len, device="meta")

    @torch.no_grad()
    def check() -> float:
        before = [x.to(torch.float64, copy=True) for x in rows(state, one)]
        reference = subject.in_float64(1)
        start = refilled(one, (x.clone() for x in before), state.position)
        wanted, expected = reference.step(reference.inputs[:, 0], start)
        y, after = function()
        errors = [not_finite([y]), relative_error(y[-1:], wanted)]
        errors.append(0.0 if after.position == expected.position else math.inf)
        for got, x, old in zip(rows(after, one), rows(expected), before, strict=True):
            changed = x != old
            errors.append(relative_error(got[changed], x[changed]))
        return worst(errors)

    return check


@torch.enable_grad()
def folded(reference: Subject) -> tuple[Tensor, Tensor]:
    """Outputs of the fold, and the gradient of its objective with respect to the leaf."""
    leaf = reference.leaf().requires_grad_()
    outputs = reference.fold()
    objective, seed = reference.objective(outputs)
    (gradient,) = torch.autograd.grad(objective, leaf, seed)
    return outputs.detach(), gradient


def prefix_error(subject: Subject, outputs: Tensor, expected: Tensor, gradient: Tensor) -> float:
    """The error of the first tokens' outputs, and of the gradient through the timed graph."""
    tokens = expected.shape[1]
    first = outputs[-1:, :tokens]
    objective, seed = subject.last_row(tokens).objective(first)
    leaf = subject.leaf()
    (got,) = torch.autograd.grad(objective, leaf, seed, retain_graph=True)
    # Of a block's inputs one row's first tokens have one; of the embedding the whole weight.
    part = got if leaf is not subject.inputs else got[-1:, :tokens]
    return worst(
        [
            not_finite([outputs]),
            relative_error(first, expected),
            error_in_part(got, part, gradient),
        ]
    )


def like(y: Tensor, outputs: Tensor) -> Tensor:
    """Outputs (1, T, ...) or (1, ...), or their last token where y holds no others."""
    return outputs[:, -1] if outputs.ndim > y.ndim else outputs


def rows(state: Any, one: Any = None) -> list[Tensor]:
    """The tensors of a state, each its last batch row; `one` is the state of a single row."""
    if isinstance(state, Tensor):
        if one is None or state.shape == one.shape:
            return [state]
        axis = next(i for i, n in enumerate(state.shape) if n != one.shape[i])
        return [state.narrow(axis, state.shape[axis] - 1, 1)]
    if isinstance(state, tuple):
        ones = one if one is not None else (None,) * len(state)
        return [x for part, o in zip(state, ones, strict=True) for x in rows(part, o)]
    return []


def refilled(state: Any, tensors: Iterator[Tensor], position: int) -> Any:
    """A state of the same form with other tensors, at `position`."""
    if isinstance(state, Tensor):
        return next(tensors)
    if isinstance(state, tuple):
        parts = [refilled(part, tensors, position) for part in state]
        state = type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
        return state._replace(position=position) if hasattr(state, "position") else state
    return state
