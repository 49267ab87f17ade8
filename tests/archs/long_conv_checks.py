"""What the tests of the long convolution's kernels share."""

import mmap
from typing import Any

import torch
import torch.nn.functional as F

from archs.ops.long_conv import LongConvPlan, long_conv
from kernel_checks import assert_as_exact, randn

GATES = ("pre_gate", "post_gate")
SHORT = (*GATES, "short_filters")
FORMS = {
    "bare": (),
    "skip": ("skip",),
    "pre": ("pre_gate",),
    "pre, skip": ("pre_gate", "skip"),
    "post": ("post_gate",),
    "post, skip": ("post_gate", "skip"),
    "gates": GATES,
    "gates, skip": (*GATES, "skip"),
    "short": SHORT,
    "short, skip": (*SHORT, "skip"),
    "short, bias": (*SHORT, "short_bias"),
    "all": (*SHORT, "skip", "short_bias"),
}
SIGNALS = ("u", *GATES)
# Results of one row and channel each. The others are sums over rows.
ROWS = ("y", "du", "dpre_gate", "dpost_gate")
# What a gradient is as large as that may itself vanish: sums of as many terms.
TERMS = {"dskip": "dfilter", "dshort_bias": "dshort_filters"}
ACCURATE, FAST = LongConvPlan(1, "accurate"), LongConvPlan(1, "fast")
# Relative to the largest value: what transforms in float32 leave, and where all their sums, of up
# to 128 products, and all roundings in them have one sign.
ROUNDING, ONE_SIGN = 1e-6, {"accurate": 3e-6, "fast": 2e-3}
MAP_NORESERVE = 0x4000  # Linux; the mmap module has no name for it


def inputs(form, B, D, T, dtype=torch.float32, spare=0, seed=0):
    """u, a filter with `spare` taps after T, what the form has, and a gradient of y."""
    shapes = {
        "u": (B, D, T),
        "filter": (D, T + spare),
        "pre_gate": (B, D, T),
        "post_gate": (B, D, T),
        "skip": (D,),
        "short_filters": (3, D, 3),
        "short_bias": (3, D),
        "dy": (B, D, T),
    }
    return {
        name: randn(*shape, dtype=dtype, seed=seed + i)
        for i, (name, shape) in enumerate(shapes.items())
        if name in ("u", "filter", "dy", *FORMS[form])
    }


def direct(
    u,
    filter,
    pre_gate=None,
    post_gate=None,
    skip=None,
    short_filters=None,
    short_bias=None,
):
    """The definition as sums over tokens: a triangular matrix of taps times the signal."""
    D, T = u.shape[1:]
    signals: list[Any] = [post_gate, pre_gate, u]
    if short_filters is not None:
        biases = [None] * 3 if short_bias is None else short_bias
        signals = [
            F.conv1d(F.pad(x, (2, 0)), taps.unsqueeze(1), bias, groups=D)
            for x, taps, bias in zip(signals, short_filters, biases, strict=True)
        ]
    post, pre, v = signals
    z = v if pre is None else pre * v
    taps = F.pad(filter[:, :T], (T - 1, 0)).unfold(1, T, 1)  # (D, T, T): filter_{t-s} at T-1-s
    y = torch.einsum("dts,bds->bdt", taps, z.flip(2))
    y = y if skip is None else y + skip[:, None] * z
    return y if post is None else post * y


def results(args, function, gradients=True):
    """y and every gradient, by name."""
    leaves = {k: x.detach().requires_grad_() for k, x in args.items() if k != "dy"}
    y = function(**leaves)
    if not gradients:
        return {"y": y.detach()}
    found = torch.autograd.grad(y, list(leaves.values()), args["dy"])
    return {"y": y.detach()} | dict(zip((f"d{k}" for k in leaves), found, strict=True))


def kernel_results(args, plan: LongConvPlan | None = ACCURATE, gradients=True):
    return results(args, lambda **x: long_conv(**x, plan=plan, backend="triton"), gradients)


def plain_results(args, gradients=True):
    """By PyTorch's FFT in float32."""
    return results(args, lambda **x: long_conv(**x, backend="torch"), gradients)


def exact_results(args, function=direct, gradients=True):
    return results({k: x.double() for k, x in args.items()}, function, gradients)


def terms_of(name, exact):
    return exact.get(TERMS.get(name))


def assert_exact(got, plain, exact):
    assert got.keys() == plain.keys() == exact.keys()
    for name in exact:
        values = got[name], plain[name], exact[name]
        factor = 2 if name == "y" else 3
        assert_as_exact(*values, factor, name, got["y"].dtype, terms_of(name, exact))


def strided(args):
    """The same values, each tensor in strides of its own."""
    changes = {
        "u": lambda x: torch.cat([x, x]).transpose(0, 1).contiguous().transpose(0, 1)[: len(x)],
        "filter": lambda x: F.pad(x, (3, 5))[:, 3:-5],
        "pre_gate": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
        "post_gate": lambda x: F.pad(x, (0, 7))[:, :, :-7],
        "dy": lambda x: x.repeat_interleave(3, 1)[:, ::3],
        "skip": lambda x: x.repeat_interleave(2)[::2],
        "short_filters": turned,
        "short_bias": turned,
    }
    return {k: changes[k](x) for k, x in args.items()}


def turned(x):
    """The same values, the first axis innermost."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def far_apart(x, axis):
    """The same values, their rows or channels so far apart that the third is past 2^31 elements."""
    strides = {0: (2**30, x.shape[-1], 1), 1: (x.shape[-1], 2**30, 1)}[axis][3 - x.ndim :]
    # Memory that is there once it is written, and only then.
    flags = mmap.MAP_PRIVATE | MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, 9 * 2**30, flags=flags), dtype=torch.float32)
    return memory.as_strided(x.shape, strides).copy_(x)
