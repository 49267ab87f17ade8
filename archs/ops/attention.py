"""Causal softmax attention, with grouped queries, a sliding window and ragged lengths.

Scaled dot-product attention: Vaswani et al. 2017 (arXiv 1706.03762, section 3.2.1). Grouped
queries: Ainslie et al. 2023 (arXiv 2305.13245, section 2.2). Sliding window, its causal half:
Beltagy et al. 2020 (arXiv 2004.05150, section 3.1). The query at position p reads the keys j <= p,
with a window w only those with p - w < j:

    y_p = sum_j softmax_j(q_p . k_j / sqrt(K)) v_j

Letters: B batch, T queries, S keys (S >= T), H query heads, H_kv key/value heads, K head size.
Query head h reads key head h // (H / H_kv). The causal mask is aligned at the end: query t sits at
position S - T + t, so that the T newest tokens attend to a history and to themselves.

`lengths` (B,) makes rows ragged: row b's keys are the first n_b = lengths[b], and its query t sits
at n_b - T + t. A query before the first key (n_b < T) reads nothing and yields 0, as in
FlashAttention. Keys from n_b on are never read into a result, but must be finite.
"""

from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from archs.ops import Backend, BackendUnavailableError, in_its_own_types, kernels, no_such_backend
from archs.ops.plan import multiprocessors

# Queries that share one call and one mask where the causal form does not fit: of 128, 256 and 512
# the fastest on a CPU for windows of 256 and 1024, forward and backward.
QUERY_BLOCK = 256

LARGEST_HEAD = 256  # K of the Triton kernels
DECODE_ROWS = 64  # at most: queries of all heads that share a key head, in one tile
PROGRAMS = 3  # a multiprocessor, where keys are split: as many as have room at K = 128
LEAST_SPLIT = 256  # keys
LARGEST_MERGE = 2048  # splits times rows, which one program puts together, 64 at a time


class AttentionPlan(NamedTuple):
    """Which variant of the Triton kernels runs forward."""

    # tiles of queries; decode: few queries, their keys split; hopper: tiles of queries, in Gluon,
    # for compute capability 9.0, without lengths
    path: Literal["tiles", "decode", "hopper"] = "tiles"
    splits: int = 1  # of the keys, in path decode


PATHS: tuple[str, ...] = get_args(AttentionPlan.__annotations__["path"])


def plan(
    shape: tuple[int, int, int, int],
    keys: tuple[int, int],
    device: torch.device | str,
    window: int | None = None,
) -> AttentionPlan:
    """The plan for q of a shape (B, T, H, K) and (S, H_kv) keys and key heads.

    Few queries over more keys are decoded, the keys split where batch rows and key heads have too
    few programs. Arithmetic, not measured. Path "hopper" has never run on a GPU, and is not chosen.
    """
    B, T, H, _ = shape
    S, H_kv = keys
    rows = T * H // H_kv
    if rows > DECODE_ROWS or 1 < T == S:
        return AttentionPlan()
    read = S if window is None else min(S, T + window - 1)
    fill = PROGRAMS * multiprocessors(device) // max(1, B * H_kv)
    return AttentionPlan("decode", max(1, min(fill, read // LEAST_SPLIT, LARGEST_MERGE // rows)))


def attention_step(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, lengths: Tensor | None = None
) -> Tensor:
    """One query per row, at the position of the row's last key.

    Args:
        q: (B, H, K).
        k: (B, S, H_kv, K).
        v: (B, S, H_kv, K).
        window: number of newest keys read; None reads all.
        lengths: (B,) valid keys of each row; None means S.

    Returns:
        y (B, H, K), computed in float32 at least, in the type of q.
    """
    B, H, K = q.shape
    S, H_kv = k.shape[1:3]
    compute = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(compute).reshape(B, H_kv, H // H_kv, K)
    keys_left = torch.full((B,), S, device=q.device) if lengths is None else lengths
    age = keys_left.unsqueeze(1) - 1 - torch.arange(S, device=q.device)  # (B, S)
    visible = age >= 0
    if window is not None:
        visible = visible & (age < window)
    visible = visible[:, None, None]  # (B, 1, 1, S)
    scores = torch.einsum("bhgk,bshk->bhgs", grouped, k.to(compute)) * K**-0.5
    # The lowest number, not -inf: a row without keys then has finite gradients, and weights of 0.
    scores = scores.masked_fill(~visible, torch.finfo(compute).min)
    weights = scores.softmax(-1) * visible  # (B, H_kv, H / H_kv, S)
    y = torch.einsum("bhgs,bshk->bhgk", weights, v.to(compute))
    return y.reshape(B, H, K).to(q.dtype)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Fold of `attention_step` over the T queries; arguments and result as in `attention`."""
    T, S = q.shape[1], k.shape[1]
    steps = []
    for t in range(T):
        later = T - 1 - t
        seen = S - later if lengths is None else S
        step_lengths = None if lengths is None else lengths - later
        steps.append(
            attention_step(
                q[:, t], k[:, :seen], v[:, :seen], window=window, lengths=step_lengths
            )  # (B, H, K)
        )
    return torch.stack(steps, 1)


def attention_torch(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Attention by PyTorch's fused kernels; arguments and result as in `attention`.

    Without window and lengths, T = S is one causal call. Otherwise blocks of queries attend to the
    keys that they can see, under a mask of that size: memory for masks is O(S), the cost with a
    window O(T w). With `lengths`, their extremes are read on the host.
    """
    T, S = q.shape[1], k.shape[1]
    if window is not None and window >= S:
        window = None
    if T == S > 1 and window is None and lengths is None:
        return _sdpa(q, k, v, is_causal=True)

    block = min(T, QUERY_BLOCK)
    shortest, longest = (S, S) if lengths is None else (int(n) for n in lengths.aminmax())
    shared_bias = None
    if lengths is None and T > 1:
        most = S if window is None else min(S, block + window - 1)
        newest = torch.arange(most, device=q.device)
        shared_bias = _bias(newest[-block:], newest, window, q.dtype)  # (block, most)

    outputs = []
    for start, block_q in zip(range(0, T, block), q.split(block, 1), strict=True):
        end = start + block_q.shape[1]
        first = 0 if window is None else max(0, shortest - T + start - window + 1)
        stop = max(1, longest - T + end)
        if block >= T or torch.compiler.is_compiling():  # the compiler rejects `_KeySlice`
            block_k, block_v = k[:, first:stop], v[:, first:stop]
        else:
            block_k, k = _KeySlice.apply(k, first, stop)
            block_v, v = _KeySlice.apply(v, first, stop)
        if lengths is not None:
            position = lengths.unsqueeze(1) - T + torch.arange(start, end, device=q.device)
            empty = (position < 0).unsqueeze(-1)  # (B, block, 1)
            bias = _bias(position, torch.arange(first, stop, device=q.device), window, q.dtype)
            bias = bias.masked_fill(empty, 0.0)
            y = _sdpa(block_q, block_k, block_v, bias=bias.unsqueeze(1))
            outputs.append(y.masked_fill(empty.unsqueeze(-1), 0.0))
        elif shared_bias is not None:
            bias = shared_bias[start - end :, first - stop :]
            outputs.append(_sdpa(block_q, block_k, block_v, bias=bias))
        else:
            outputs.append(_sdpa(block_q, block_k, block_v))
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]


def _bias(position: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where the query at `position` (..., T) reads the key at `keys` (S,), else -inf."""
    age = position.unsqueeze(-1) - keys  # (..., T, S)
    hidden = age < 0
    if window is not None:
        hidden |= age >= window
    return torch.zeros(age.shape, dtype=dtype, device=age.device).masked_fill_(hidden, -torch.inf)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """PyTorch's attention in this module's layout, (B, T, H, K)."""
    B, T, H, K = q.shape
    H_kv = k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, H_kv, S, K)
    if T == 1:
        # The heads of a group become queries of their one key head, which is then read once.
        y = scaled_dot_product_attention(q.reshape(B, H_kv, H // H_kv, K), k, v, attn_mask=bias)
        return y.reshape(B, 1, H, K)
    y = scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=bias, is_causal=is_causal, enable_gqa=H_kv != H
    )
    return y.transpose(1, 2)


class _KeySlice(torch.autograd.Function):
    """A view of x[:, first:stop], and x again to take the next slice from.

    The gradients of all slices of such a chain are added into one buffer. Plain slicing would pad
    each of them to the length of x: O(S) work a slice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int, stop: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.first, ctx.stop = x.shape, first, stop
        return x[:, first:stop], x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slice_gradient: Tensor, buffer: Tensor | None) -> tuple:
        if buffer is None:  # the last slice of the chain comes first
            buffer = slice_gradient.new_zeros(ctx.shape)
        buffer[:, ctx.first : ctx.stop] += slice_gradient
        return buffer, None, None


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    lengths: Tensor | None = None,
    chosen: AttentionPlan | None = None,
) -> Tensor:
    """Our Triton kernels; arguments and result as in `attention`."""
    module = _kernels(q)
    B, T, H, K = q.shape
    S, H_kv = k.shape[1:3]
    if window is not None and window >= S:
        window = None
    if chosen is None:
        chosen = plan((B, T, H, K), (S, H_kv), q.device, window)
    _check_plan(chosen, T * H // H_kv, lengths)
    return module.attention_op(q, k, v, lengths, window, *chosen)[0]


def _check_plan(chosen: AttentionPlan, rows: int, lengths: Tensor | None) -> None:
    """ValueError for a plan that cannot be, `rows` queries sharing a key head."""
    if (
        chosen.path not in PATHS
        or chosen.splits < 1
        or (chosen.splits > 1 and chosen.path != "decode")
    ):
        raise ValueError(
            f"attention: a plan has a path of {', '.join(PATHS)}, and splits from 1 on in path "
            f"'decode' alone, got {chosen}"
        )
    if chosen.path == "decode" and rows > DECODE_ROWS:
        raise ValueError(
            f"attention: path 'decode' has room for {DECODE_ROWS} queries of all heads that share "
            f"a key head, got {rows}; use path 'tiles'"
        )
    if chosen.path == "hopper" and lengths is not None:
        raise ValueError("attention: path 'hopper' takes no lengths; use path 'tiles'")


def _kernels(q: Tensor) -> ModuleType:
    """The module of the Triton kernels, for q (..., K)."""
    if q.shape[-1] > LARGEST_HEAD:
        raise BackendUnavailableError(
            f"attention: backend 'triton' has kernels for head sizes K up to {LARGEST_HEAD}, and "
            f"got {q.shape[-1]}; use 'torch'"
        )
    return kernels("attention", q)


@in_its_own_types
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    lengths: Tensor | None = None,
    plan: AttentionPlan | None = None,
    backend: Backend,
) -> Tensor:
    """Causal attention of the T newest tokens to S keys, themselves included.

    Args:
        q: queries (B, T, H, K).
        k: keys (B, S, H_kv, K), S >= T, H a multiple of H_kv.
        v: values (B, S, H_kv, K).
        window: how many of the newest keys a query reads, its own included; None reads all.
        lengths: (B,) integers in [0, S], the valid keys of each row; None means S.
        plan: the variant of the Triton kernels; None means what `archs.ops.attention.plan` chooses.
        backend: "reference", "torch" or "triton" (K up to 256; for its precision see
            `archs.ops.attention_kernel`).

    Returns:
        y (B, T, H, K) in the type of q.

    Raises:
        ValueError: shapes, types or devices that do not fit, window < 1, lengths outside [0, S]
            (values are checked on the CPU only), an unknown backend, a plan that cannot be or is
            for another backend.
        BackendUnavailableError: the backend cannot run here.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "attention: expected q (B, T, H, K) and k, v (B, S, H_kv, K), "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    B, T, H, K = q.shape
    S, H_kv = k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != K or H % H_kv:
        raise ValueError(
            "attention: k must have q's batch and head size, and H must be a multiple of H_kv, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    if not 1 <= T <= S:
        raise ValueError(f"attention: needs 1 <= T <= S, got {T} queries and {S} keys")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q, k and v must have one type, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1, got {window}")
    if lengths is not None:
        if lengths.shape != (B,) or lengths.is_floating_point():
            raise ValueError(
                f"attention: lengths must be {B} integers, "
                f"got {lengths.dtype} of shape {tuple(lengths.shape)}"
            )
        if lengths.device != q.device:
            raise ValueError(f"attention: lengths must be on {q.device}, not {lengths.device}")
        if lengths.device.type == "cpu" and not ((lengths >= 0) & (lengths <= S)).all():
            raise ValueError(f"attention: lengths must lie in [0, {S}], got {lengths.tolist()}")
    if backend == "triton":
        return attention_triton(q, k, v, window=window, lengths=lengths, chosen=plan)
    if plan is not None:
        raise ValueError(f"attention: plan is for backend 'triton', got backend {backend!r}")
    if backend == "reference":
        return attention_reference(q, k, v, window=window, lengths=lengths)
    if backend == "torch":
        return attention_torch(q, k, v, window=window, lengths=lengths)
    raise no_such_backend("attention", backend)
