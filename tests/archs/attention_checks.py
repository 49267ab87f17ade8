"""What the tests of attention's Triton kernels share."""

import math

import torch

from archs.ops.attention import AttentionPlan, attention
from kernel_checks import DEVICE, assert_as_exact, randn

TILES, ONE = AttentionPlan(), AttentionPlan("decode")


def inputs(B, T, S, H, H_kv, K, dtype=torch.float32, seed=0):
    return {
        "q": randn(B, T, H, K, dtype=dtype, seed=seed),
        "k": randn(B, S, H_kv, K, dtype=dtype, seed=seed + 1),
        "v": randn(B, S, H_kv, K, dtype=dtype, seed=seed + 2),
    }


def ragged(*lengths):
    return torch.tensor(lengths, device=DEVICE)


def results(args, backend, gradients=True, seed_type=None, **options):
    """y and, from a random gradient of it, every gradient, by name."""
    leaves = {k: x.detach().requires_grad_() for k, x in args.items()}
    y = attention(**leaves, **options, backend=backend)
    named = {"y": y.detach()}
    if gradients:
        seed = randn(*y.shape, dtype=seed_type or y.dtype, seed=1).to(y.dtype)
        found = torch.autograd.grad(y, list(leaves.values()), seed)
        named |= dict(zip(("dq", "dk", "dv"), found, strict=True))
    return named


def exact_results(args, gradients=True, **options):
    wide = {k: x.double() for k, x in args.items()}
    return results(wide, "reference", gradients, args["q"].dtype, **options)


def check(args, plan=None, gradients=True, **options):
    """Against plain PyTorch in float32 on the same inputs, its results rounded to their type."""
    dtype = args["q"].dtype
    got = results(args, "triton", gradients, plan=plan, **options)
    wide = {k: x.float() for k, x in args.items()}
    plain = results(wide, "torch", gradients, dtype, **options)
    exact = exact_results(args, gradients, **options)
    sums = terms(args, **options)
    for name in exact:
        assert got[name].isfinite().all(), name
        factor = 2 if name == "y" else 3
        values = got[name], plain[name].to(dtype), exact[name]
        assert_as_exact(*values, factor, name, terms=sums.get(name))


def visible(T, S, B, window=None, lengths=None):
    """Which query reads which key: (B, T, S)."""
    valid = torch.full((B,), S, device=DEVICE) if lengths is None else lengths
    position = valid[:, None] - T + torch.arange(T, device=DEVICE)  # (B, T)
    age = position[:, :, None] - torch.arange(S, device=DEVICE)
    return (age >= 0) & (age < (S if window is None else window))


def terms(args, **options):
    """How large the sums are, were their terms random, that the gradients of q and k are.

    They vanish where all keys are alike, or where a query reads one key: then they are rounding.
    """
    (B, T, H, K), (_, S, H_kv, _) = args["q"].shape, args["k"].shape
    q, k, v = (x.double() for x in args.values())
    k, v = (x.repeat_interleave(H // H_kv, 2) for x in (k, v))
    dy = randn(B, T, H, K, dtype=args["q"].dtype, seed=1).double()
    seen = visible(T, S, B, **options)[:, None]
    logits = torch.einsum("bthk,bshk->bhts", q, k) * K**-0.5
    weights = torch.where(seen, logits, -1e300).softmax(-1) * seen
    squares = (weights * torch.einsum("bthk,bshk->bhts", dy, v)).square() / K
    dq = torch.einsum("bhts,bshk->bthk", squares, k.square())
    dk = torch.einsum("bhts,bthk->bshk", squares, q.square())
    dk = dk.unflatten(2, (H_kv, H // H_kv)).sum(3)
    return {"dq": dq.sqrt(), "dk": dk.sqrt()}


def strided(args):
    """The same values in other strides: a cache with room behind, heads first, every other one."""
    q, k, v = args.values()
    room = torch.full((k.shape[0], k.shape[1] + 40, *k.shape[2:]), math.nan, device=DEVICE)
    room[:, : k.shape[1]] = k.to(room.dtype)
    return {
        "q": q.transpose(1, 2).contiguous().transpose(1, 2),
        "k": room.to(k.dtype)[:, : k.shape[1]],
        "v": v.repeat_interleave(2, -1)[..., ::2],
    }
