"""What WKV-7's kernel makes of rounded operands, emulated: its inverse costs no accuracy.

The kernel's chunked form with every operand of a product rounded as tensor cores take it: to
bfloat16, or cut to tf32's 10 bits (the hardware ignores the others); sums in float32. An exact
solve takes the inverse's place; the error is against a float64 fold of the same bfloat16 inputs.
"""

import numpy as np
import pytest

CHUNK, N, T = 32, 64, 128
GRID = [
    (correlation, rate, decay)
    for correlation in (0.9, 0.98)
    for rate in ("none", "random", "full")
    for decay in ("none", "random", "bound")
]


def bf16(x):
    """Rounded to nearest, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def tf32(x):
    """Cut, not rounded."""
    return (np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def inputs(correlation, rate, decay, seed=0):
    """r, log2 of the decays, k, v, a, b, all (T, N), and a state (N, N)."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal(N)
    kappa = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * rng.standard_normal((T, N))
    kappa /= np.linalg.norm(kappa, axis=1, keepdims=True)
    logits = rng.standard_normal((T, N))
    rates = {"none": 0.0, "random": 1 / (1 + np.exp(-logits)), "full": 1.0}[rate]
    share = {"none": 0.0, "random": rng.random((T, N)), "bound": 1.0}[decay]
    log2_decay = np.float32(-np.exp(-0.5) * np.log2(np.e) * share * np.ones((T, N)))
    r, v = rng.standard_normal((2, T, N))
    k = kappa * rng.random((T, N)) * np.sqrt(N)  # as correlated as what is removed
    r, k, v, a, b = (bf16(x) for x in (r, k, v, -kappa, kappa * rates))
    return r, log2_decay, k, v, a, b, rng.standard_normal((N, N)).astype(np.float32)


def fold(r, log2_decay, k, v, a, b, state):
    r, log2_decay, k, v, a, b, state = (np.float64(x) for x in (r, log2_decay, k, v, a, b, state))
    ys = []
    for t in range(T):
        removed = a[t] @ state
        state = np.exp2(log2_decay[t])[:, None] * state
        state = state + np.outer(b[t], removed) + np.outer(k[t], v[t])
        ys.append(r[t] @ state)
    return np.stack(ys), state


def exact(pairs):
    return np.linalg.inv(np.eye(CHUNK) - np.float64(pairs)).astype(np.float32)


def merged(pairs):
    """As the kernel: blocks of 2, merged two by two."""
    i, j = np.indices((CHUNK, CHUNK))
    found = np.where(i == j, np.float32(1), np.where(i // 2 == j // 2, pairs, np.float32(0)))
    size = 2
    while size < CHUNK:
        between = (i // (2 * size) == j // (2 * size)) & (i // size != j // size)
        half = tf32(found) @ tf32(np.where(between, pairs, np.float32(0)))
        found = found + tf32(half) @ tf32(found)
        size *= 2
    return found


def textbook(pairs):
    """(I + A) (I + A^2) (I + A^4) ..., which is exact without rounding."""
    found, power = np.eye(CHUNK, dtype=np.float32) + pairs, pairs
    for _ in range(4):
        power = tf32(power) @ tf32(power)
        found = found + tf32(found) @ tf32(power)
    return found


def chunked(inverse, r, log2_decay, k, v, a, b, state, low=bf16):
    """The forward kernel; `low` rounds the operands of all products but the inverse's."""
    i, j = np.indices((CHUNK, CHUNK))
    ys = []
    for t in range(0, T, CHUNK):
        at = slice(t, t + CHUNK)
        c = np.cumsum(log2_decay[at], axis=0, dtype=np.float32)
        grow = np.exp2(-c)
        b_, k_, v_ = low(b[at] * grow), low(k[at] * grow), low(v[at])
        a_, r_ = low(a[at] * np.exp2(c - log2_decay[at])), low(r[at] * np.exp2(c))
        ab = np.where(i > j, a_ @ b_.T, np.float32(0))
        ak = low(np.where(i > j, a_ @ k_.T, np.float32(0)))
        rows = a_ @ low(state) + ak @ v_
        u = low(tf32(inverse(ab)) @ tf32(rows))
        rk = low(np.where(i >= j, r_ @ k_.T, np.float32(0)))
        rb = low(np.where(i >= j, r_ @ b_.T, np.float32(0)))
        ys.append(bf16(r_ @ low(state) + rk @ v_ + rb @ u))
        state = (state + b_.T @ u + k_.T @ v_) * np.exp2(c[-1])[:, None]
    return np.concatenate(ys), state


def error(got, exact):
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def errors(inverse, case, low=bf16):
    """Of y and of the state after, RMS over RMS, the worst of three draws."""
    found = []
    for seed in range(3):
        args = inputs(*case, seed=seed)
        pairs = zip(chunked(inverse, *args, low=low), fold(*args), strict=True)
        found.append([error(got, expected) for got, expected in pairs])
    return np.max(found, axis=0)


@pytest.mark.parametrize("case", GRID)
@pytest.mark.parametrize("low", [bf16, tf32])
def test_the_inverse_costs_no_accuracy(case, low):
    got, solved = errors(merged, case, low), errors(exact, case, low)
    assert (got <= 8e-3).all(), got
    assert (got <= 1.2 * solved).all(), (got, solved)


def test_the_textbook_product_would():
    case = (0.98, "full", "none")
    assert errors(textbook, case)[0] > 5 * errors(exact, case)[0]
