"""The calls that `seqscale counters` counts: each operation at one shape, by every implementation.

Main tensors have two bytes an element; decays, filters and states four, as on a GPU. Where our
operation has a state, one is passed in and the one after it is returned.

Letters: B batch, T tokens, S keys, H heads and H_kv key heads, K, P and N sizes of a head and its
state, G groups, D channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from archs.ops.attention import AttentionPlan
from archs.ops.long_conv import LongConvPlan
from archs.ops.plan import Plan
from archs.ops.short_conv import short_conv
from harness import peers
from harness.peer_calls import MAMBA_CHUNK

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Randn = Callable[..., Tensor]  # randn(*shape), float32, seeded

SHAPES: dict[str, tuple[dict[str, int], ...]] = {
    "attention": ({"B": 1, "T": 1024, "H": 4, "K": 64}, {"B": 1, "T": 1024, "H": 4, "K": 128}),
    "ssd": ({"B": 1, "T": 1024, "H": 8, "P": 64, "N": 128, "G": 1},),
    "wkv7": ({"B": 1, "T": 1024, "H": 8, "K": 64},),
    "long_conv": ({"B": 8, "D": 64, "T": 2048},),
    "short_conv": ({"B": 1, "T": 1024, "D": 768},),
}


class Variant(NamedTuple):
    """Another variant of our kernels, at a shape where no library is counted."""

    shape: dict[str, int]
    name: str
    options: dict[str, Any]
    only: int | None = None  # compute capability times ten of the one GPU that runs it, in Gluon


# The variant of our kernels at each shape; then others, of which forward alone is interpreted.
PLANS: dict[str, dict[str, Any]] = {
    "attention": {"plan": AttentionPlan("tiles")},
    "ssd": {"plan": Plan(1)},
    "wkv7": {"plan": Plan(1)},
    "long_conv": {"plan": LongConvPlan(1, "fast")},
}
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "attention": (
        *(
            Variant(shape, "hopper", {"plan": AttentionPlan("hopper")}, only=90)
            for shape in SHAPES["attention"]
        ),
        Variant(
            {"B": 2, "T": 1, "S": 8192, "H": 8, "H_kv": 2, "K": 128},
            "decode in 8 splits",
            {"plan": AttentionPlan("decode", 8)},
        ),
    ),
    "ssd": (Variant({**SHAPES["ssd"][0], "T": 8192}, "4 segments", {"plan": Plan(4)}),),
}
# Our kernels that form tables in the first call of a length: sizes of a short one.
TABLES = {"long_conv": {"B": 1, "D": 1}}
OURS: dict[str, Callable[..., Any]] = {**peers.OUR_OPERATIONS, "short_conv": short_conv}
# Peers made of Triton kernels, which the interpreter runs, or of PyTorch operations. What a fused
# CUDA kernel moves inside cannot be seen.
KERNEL_PEERS = {"ssd": ("mamba_ssm",), "wkv7": ("fla",)}
TENSOR_PEERS = {
    "attention": ("sdpa-math",),
    "ssd": ("ssd-minimal",),
    "long_conv": ("torch-fft",),
}
# Whose many multiply-adds are not a matrix product that lost its tensor cores.
WITHOUT_PRODUCTS = ("short_conv",)
# What is kept in float32, whatever the type of the activations.
WIDE = {
    "ssd": ("log_decay", "dt", "state"),
    "wkv7": ("decay_logits", "state"),
    "long_conv": ("filter",),
}


@dataclass(frozen=True)
class Counted:
    """One implementation of an operation, with the tensors that it is called on."""

    op: str
    shape: str
    implementation: str  # triton and torch are our backends; else a name in `harness.peers.PEERS`
    kernels: bool  # made of Triton kernels
    leaves: Tensors  # inputs, recording gradients
    call: Callable[[Tensors], Outputs]  # y, then what else is written: the state after it
    reference: Callable[[Tensors], Outputs]  # the same function by our `torch` backend
    backward: bool = True  # whether the backward pass is counted
    only: int | None = None  # as in `Variant`: it is not interpreted
    prepare: Callable[[], object] = lambda: None  # form what a first call keeps for later ones

    @property
    def unavailable(self) -> str | None:
        """Why a library cannot be called here, whatever the device."""
        peer = peers.PEERS.get(self.implementation)
        return peer.unavailable("cuda") if peer else None


def calls(op: str, dtype: torch.dtype) -> list[Counted]:
    """Every implementation of an operation at each of its shapes; main tensors of `dtype`."""
    found = [call for shape in SHAPES[op] for call in _calls(op, shape, dtype)]
    for variant in VARIANTS.get(op, ()):
        label = f"{_label(variant.shape)}, {variant.name}"
        ours = _our_kernels(op, label, _inputs(op, variant.shape, dtype), variant.options)
        found.append(replace(ours, backward=False, only=variant.only))
    return found


def _label(shape: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in shape.items())


def _inputs(op: str, shape: dict[str, int], dtype: torch.dtype) -> Tensors:
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return {
        name: x if name in WIDE.get(op, ()) else x.to(dtype)
        for name, x in INPUTS[op](randn, **shape).items()
    }


def _our_kernels(op: str, label: str, inputs: Tensors, options: dict[str, Any]) -> Counted:
    call, reference = partial(_ours, op, "triton", **options), partial(_ours, op, "torch")
    return Counted(op, label, "triton", True, _leaves(inputs), call, reference)


def _calls(op: str, shape: dict[str, int], dtype: torch.dtype) -> list[Counted]:
    label, inputs = _label(shape), _inputs(op, shape, dtype)
    reference = partial(_ours, op, "torch")
    kernels = _our_kernels(op, label, inputs, PLANS.get(op, {}))
    if op in TABLES:
        little = _inputs(op, {**shape, **TABLES[op]}, dtype)
        kernels = replace(kernels, prepare=partial(kernels.call, little))
    found = [
        kernels,
        Counted(op, label, "torch", False, _leaves(inputs), reference, reference),
    ]
    for name in TENSOR_PEERS.get(op, ()):
        found.append(
            Counted(op, label, name, False, _leaves(inputs), partial(_theirs, name), reference)
        )
    for name in KERNEL_PEERS.get(op, ()):
        leaves, call, ours = KERNEL_CALLS[name](inputs)
        found.append(Counted(op, label, name, True, _leaves(leaves), call, ours))
    return found


def _leaves(inputs: Tensors) -> Tensors:
    return {name: x.clone().requires_grad_() for name, x in inputs.items()}


def _ours(op: str, backend: str, leaves: Tensors, **options: Any) -> Outputs:
    return _outputs(OURS[op](**leaves, **FIXED.get(op, {}), **options, backend=backend))


def _theirs(name: str, leaves: Tensors) -> Outputs:
    peer = peers.PEERS[name]
    return _outputs(peer.call(**leaves, **FIXED.get(peer.op, {})))


def _outputs(result: Tensor | tuple[Tensor | None, ...]) -> Outputs:
    results = result if isinstance(result, tuple) else (result,)
    return tuple(x for x in results if x is not None)


FIXED: dict[str, dict[str, Any]] = {
    "wkv7": {"log_decay": None},
    "short_conv": {"activation": "silu"},
}


def _attention(
    randn: Randn, B: int, T: int, H: int, K: int, S: int | None = None, H_kv: int | None = None
) -> Tensors:
    keys = B, S or T, H_kv or H, K
    return {"q": randn(B, T, H, K), "k": randn(*keys), "v": randn(*keys)}


def _ssd(randn: Randn, B: int, T: int, H: int, P: int, N: int, G: int) -> Tensors:
    dt = F.softplus(randn(B, T, H) - 4)
    return {
        "x": randn(B, T, H, P),
        "log_decay": -dt * torch.linspace(1, 16, H),
        "b": randn(B, T, G, N),
        "c": randn(B, T, G, N),
        "dt": dt,
        "state": randn(B, H, P, N),
    }


def _wkv7(randn: Randn, B: int, T: int, H: int, K: int) -> Tensors:
    shape = (B, T, H, K)
    removal = F.normalize(randn(*shape), dim=-1)
    return {
        "r": randn(*shape),
        "decay_logits": randn(*shape),
        "k": randn(*shape),
        "v": randn(*shape),
        "a": -removal,
        "b": removal * torch.sigmoid(randn(*shape)),
        "state": randn(B, H, K, K),
    }


def _long_conv(randn: Randn, B: int, D: int, T: int) -> Tensors:
    signals = {name: randn(B, D, T) for name in ("u", "pre_gate", "post_gate")}
    window = torch.exp(-8 * torch.arange(T) / T)
    return {
        **signals,
        # Of norm 1: gradients that sum over B T products stay in float16's range.
        "filter": randn(D, T) * window / torch.linalg.vector_norm(window),
        "skip": randn(D),
        "short_filters": randn(3, D, 3) / 3,
        "short_bias": randn(3, D),
    }


def _short_conv(randn: Randn, B: int, T: int, D: int) -> Tensors:
    return {
        "x": randn(B, T, D),
        "weight": randn(D, 4),
        "bias": randn(D),
        "state": randn(B, D, 3),
    }


INPUTS: dict[str, Callable[..., Tensors]] = {
    "attention": _attention,
    "ssd": _ssd,
    "wkv7": _wkv7,
    "long_conv": _long_conv,
    "short_conv": _short_conv,
}

Kernels = tuple[Tensors, Callable[[Tensors], Outputs], Callable[[Tensors], Outputs]]


def _mamba_ssm(inputs: Tensors) -> Kernels:
    """mamba_ssm's own form: the rate A (H,) instead of A dt, no state before, the one after."""
    names = ("x", "dt", "b", "c")
    rate = inputs["log_decay"][0, 0] / inputs["dt"][0, 0]
    leaves = {**{name: inputs[name] for name in names}, "rate": rate}

    def call(leaves: Tensors) -> Outputs:
        peers.import_mamba_ssm()
        library = import_module("mamba_ssm.ops.triton.ssd_combined")
        x, dt, b, c, rate = (leaves[name] for name in (*names, "rate"))
        return library.mamba_chunk_scan_combined(
            x, dt, rate, b, c, MAMBA_CHUNK, return_final_states=True
        )

    def ours(leaves: Tensors) -> Outputs:
        others = {name: leaves[name] for name in names}
        state = torch.zeros_like(inputs["state"], dtype=leaves["dt"].dtype)
        return _ours(
            "ssd",
            "torch",
            {**others, "log_decay": leaves["rate"] * leaves["dt"], "state": state},
        )

    return leaves, call, ours


def _fla(inputs: Tensors) -> Kernels:
    """fla's, with the log-decay formed from logits before it: our operation on the same inputs."""
    return inputs, partial(_theirs, "fla"), partial(_ours, "wkv7", "torch")


KERNEL_CALLS: dict[str, Callable[[Tensors], Kernels]] = {"mamba_ssm": _mamba_ssm, "fla": _fla}
