"""WKV-7: a linear recurrence with a decay a channel and a rank-one correction of the state.

Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv 2503.14456, section 4.
The delta rule, gated or not, is the special case of one decay a head and a_t = -k_t, b_t ~ k_t.

    S_t = diag(exp(log_decay_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T
    y_t = S_t^T r_t

(The paper writes the transpose of S; there a_t = -kappa_t, the removal key, and b_t = kappa_t times
the in-context learning rate.) Letters: B batch, T tokens, H heads, K key and V value dimension;
C tokens in a chunk, N chunks of all heads and batch rows computed at once.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from archs.ops import Backend, BackendUnavailableError, in_its_own_types, kernels, no_such_backend
from archs.ops.plan import Plan, segments_that_fill

DECAY_BOUND = 0.6065306597126334  # exp(-1/2): RWKV-7's log decays lie above minus this

# C, and N at most, on a CPU: the fastest of 16 to 64 and of 16 to 256 measured at K = V = 64 on two
# cores with AVX-512 and 2 MB of L2 cache each.
CHUNK = 32
IN_FLIGHT = 64
IN_FLIGHT_GPU = 2048  # an estimate: enough to fill a GPU, and under 2 GB in all
# exp(-20) = 2e-9 is nothing beside float32's 6e-8, and exp(20 * CHUNK) still fits float64.
LOG_DECAY_FLOOR = -20.0

KERNEL_SIZES = (16, 32, 64, 128)  # of K = V in the Triton kernels


def plan(shape: tuple[int, int, int, int], device: torch.device | str) -> Plan:
    """The plan for r of a shape (B, T, H, K): one pass has a program a head."""
    B, T, H, _ = shape
    return segments_that_fill(B * H, T, device)


def wkv7_step(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence.

    r, log_decay, k, a, b (B, H, K); v (B, H, V); state (B, H, K, V)
    -> y (B, H, V) in r's dtype, the next state in the state's dtype.
    """
    dtype = r.dtype
    r, log_decay, k, v, a, b = (x.to(state.dtype) for x in (r, log_decay, k, v, a, b))
    removed = a[..., None, :] @ state  # (B, H, 1, V)
    state = (
        log_decay.exp()[..., None] * state + b[..., None] * removed + k[..., None] * v[..., None, :]
    )
    return (r[..., None, :] @ state)[..., 0, :].to(dtype), state


def wkv7_reference(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The fold of `wkv7_step` over time; arguments as `wkv7`, state required."""
    ys = []
    for t in range(r.shape[1]):
        y_t, state = wkv7_step(r[:, t], log_decay[:, t], k[:, t], v[:, t], a[:, t], b[:, t], state)
        ys.append(y_t)
    return torch.stack(ys, dim=1), state


def wkv7_torch(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The chunked form: matrix products inside chunks of C tokens, states passed between them.

    Arguments as `wkv7`, state required. Work and memory are linear in T. A log decay under
    `LOG_DECAY_FLOOR` counts as that floor, so that nothing overflows.

    With S the state before a chunk and c_t the sum of its log decays up to token t, the rows
    u_t = S_{t-1}^T a_t solve a triangular system, and everything else is a product:

        u = [a_t exp(c_{t-1})] S + A_ab u + A_ak v
        y = [r_t exp(c_t)] S + A_rb u + A_rk v
        S' = diag(exp(c_C)) S + [b_t exp(c_C - c_t)]^T u + [k_t exp(c_C - c_t)]^T v
        A_ab[t, s] = a_t . exp(c_{t-1} - c_s) b_s for s < t, A_rb[t, s] = r_t . exp(c_t - c_s) b_s
        for s <= t, and A_ak, A_rk likewise

    The A are formed and I - A_ab is inverted in float64. Against a float64 fold, with keys
    correlated at up to 0.98, the outputs then err at most 1.9 times as much as a float32 fold, and
    9 times with float32 throughout. Nor does float64 need exponents centred in the chunk, by which
    a later decay would change the rounding of an earlier output.
    """
    return _ChunkedWKV7.apply(r, log_decay.clamp(min=LOG_DECAY_FLOOR), k, v, a, b, state)


def wkv7_triton(
    r: Tensor,
    decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    *,
    logits: bool,
    chosen: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Our Triton kernels; arguments as `wkv7`, decay its log_decay or decay_logits."""
    module = _kernels(r, v)
    B, T, H, K = r.shape
    chosen = plan((B, T, H, K), r.device) if chosen is None else chosen
    if chosen.segments < 1:
        raise ValueError(f"wkv7: a plan has one segment at least, got {chosen.segments}")
    k, v, a, b = (x.to(r.dtype) for x in (k, v, a, b))
    inputs = (r, decay, k, v, a, b, state)
    keeps = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, end, _ = module.wkv7_op(*inputs, logits, chosen.segments, keeps)
    return y, None if state is None else end


def wkv7_step_triton(
    r: Tensor,
    decay_logits: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """`wkv7_step` of `log_decay_of(decay_logits)` as one Triton kernel; state in float32."""
    module = _kernels(r, v)
    k, v, a, b = (x.to(r.dtype) for x in (k, v, a, b))
    return module.wkv7_step_op(r, decay_logits, k, v, a, b, state, True)


@in_its_own_types
def wkv7(
    r: Tensor,
    log_decay: Tensor | None,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    decay_logits: Tensor | None = None,
    plan: Plan | None = None,
    backend: Backend,
) -> tuple[Tensor, Tensor | None]:
    """WKV-7: a recurrence with a decay a channel and a rank-one correction of the state.

    Args:
        r: (B, T, H, K), T >= 1, what the state is read along.
        log_decay: (B, T, H, K) in [-exp(-1/2), 0]; None where `decay_logits` is given. On backend
            "triton" y and the state are NaN from where it is under -1.
        k: (B, T, H, K), what v is written along.
        v: (B, T, H, V).
        a: (B, T, H, K), what is read for removal; of norm at most 1 for a stable recurrence.
        b: (B, T, H, K), what the removed value is written along.
        state: (B, H, K, V), the state before r; None means zeros.
        decay_logits: (B, T, H, K): log_decay = -exp(-1/2) * sigmoid(decay_logits).
        plan: the variant of the Triton kernels; None means what `archs.ops.wkv7.plan` chooses.
        backend: "reference", "torch" or "triton" (K = V of 16, 32, 64 or 128; for its
            precision see `archs.ops.wkv7_kernel`).

    Returns:
        y (B, T, H, V) in r's dtype, and the state after r exactly when one was passed in, in
        float32 (float64 for float64 r); all sums are formed in that type at least.

    Raises:
        ValueError: shapes do not fit, both or neither of log_decay and decay_logits are given, or
            the backend is unknown, or has no plans.
        BackendUnavailableError: the backend cannot run here.
    """
    if (log_decay is None) == (decay_logits is None):
        raise ValueError("wkv7: give either log_decay or decay_logits, and None for the other")
    _validate(r, log_decay, k, v, a, b, state, decay_logits)
    wide = torch.promote_types(r.dtype, torch.float32)
    if backend == "triton":
        decay = log_decay if decay_logits is None else decay_logits
        assert decay is not None
        state = None if state is None else state.to(wide)
        logits = log_decay is None
        return wkv7_triton(r, decay, k, v, a, b, state, logits=logits, chosen=plan)
    if plan is not None:
        raise ValueError(f"wkv7: plan is for backend 'triton', got backend {backend!r}")
    if decay_logits is not None:
        log_decay = log_decay_of(decay_logits.to(wide))
    assert log_decay is not None
    if state is None:
        B, _, H, K = r.shape
        start = torch.zeros(B, H, K, v.shape[3], dtype=wide, device=r.device)
    else:
        start = state.to(wide)
    if backend == "reference":
        y, end = wkv7_reference(r, log_decay, k, v, a, b, start)
    elif backend == "torch":
        y, end = wkv7_torch(r, log_decay, k, v, a, b, start)
    else:
        raise no_such_backend("wkv7", backend)
    return y, None if state is None else end


def log_decay_of(decay_logits: Tensor) -> Tensor:
    """-exp(-1/2) * sigmoid(decay_logits), RWKV-7's log decay, of any shape."""
    return -DECAY_BOUND * torch.sigmoid(decay_logits)


class _Chunks(NamedTuple):
    """What N chunks do to whatever state each starts from."""

    decay_a: Tensor  # (N, C, K) float64: exp(c_{t-1})
    decay_r: Tensor  # (N, C, K) float64: exp(c_t)
    growth: Tensor  # (N, C, K) float64: exp(-c_t)
    whole_decay: Tensor  # (N, K, 1) float64: exp(c_C)
    reads: Tensor  # (N, 2C, K) float64: a exp(c_{t-1}) above r exp(c_t)
    writes: Tensor  # (N, 2C, K) float64: b exp(-c_t) above k exp(-c_t)
    reads_r: Tensor  # (N, C, K): the lower half of reads
    to_end: Tensor  # (N, 2C, K): writes times exp(c_C)
    pairs: Tensor  # (N, 2C, 2C): A_ab, A_ak above A_rb, A_rk
    inverse: Tensor  # (N, C, C): of I - A_ab
    u_of_state: Tensor  # (N, C, K): u = u_of_state S + u_of_v
    u_of_v: Tensor  # (N, C, V)
    transition: Tensor  # (N, K, K): S' = transition S + arrival
    arrival: Tensor  # (N, K, V)


def _chunks(r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> _Chunks:
    """What does not depend on the states; inputs (N, C, K) float64, v (N, C, V)."""
    C, dtype = v.shape[1], v.dtype
    decay_r = log_decay.cumsum(dim=1).exp()
    decay_a = F.pad(decay_r[:, :-1], (0, 0, 1, 0), value=1.0)
    growth, whole_decay = decay_r.reciprocal(), decay_r[:, -1, :, None]
    reads = torch.cat((a * decay_a, r * decay_r), dim=1)
    writes = torch.cat((b * growth, k * growth), dim=1)
    pairs = (reads @ writes.mT).masked_fill_(_absent(C, v.device), 0.0)
    eye = torch.eye(C, dtype=pairs.dtype, device=v.device).expand(len(v), C, C)
    inverse = torch.linalg.solve_triangular(
        eye - pairs[:, :C, :C], eye, upper=False, unitriangular=True
    )
    u_of_state = (inverse @ reads[:, :C]).to(dtype)
    u_of_v = (inverse @ (pairs[:, :C, C:] @ v.double())).to(dtype)
    to_end = (writes * whole_decay.mT).to(dtype)
    transition = to_end[:, :C].mT @ u_of_state
    transition.diagonal(dim1=1, dim2=2).add_(whole_decay[:, :, 0])
    return _Chunks(
        decay_a=decay_a,
        decay_r=decay_r,
        growth=growth,
        whole_decay=whole_decay,
        reads=reads,
        writes=writes,
        reads_r=reads[:, C:].to(dtype),
        to_end=to_end,
        pairs=pairs.to(dtype),
        inverse=inverse.to(dtype),
        u_of_state=u_of_state,
        u_of_v=u_of_v,
        transition=transition,
        arrival=to_end.mT @ torch.cat((u_of_v, v), dim=1),
    )


def _absent(C: int, device: torch.device) -> Tensor:
    """The pairs (2C, 2C) that do not interact: a sees only s < t, r only s <= t."""
    t = torch.arange(C, device=device)
    return torch.cat((t[:, None] <= t, t[:, None] < t)).repeat(1, 2)


class _ChunkedWKV7(torch.autograd.Function):
    """The chunked form and its adjoint, a segment of whole chunks at a time.

    Keeps the inputs and one state a segment, and computes the rest again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, state = tensors
        S = state.flatten(0, 1)  # (B H, K, V)
        y = torch.empty_like(inputs[3], dtype=inputs[0].dtype)
        starts = []
        for segment in _segments(y):
            starts.append(S)
            r, log_decay, k, v, a, b = _split_all(inputs, segment, state.dtype)
            chunks = _chunks(r, log_decay, k, v, a, b)
            start, S = _states(chunks, S)
            sources = _sources(chunks, start, v)
            y_chunks = torch.baddbmm(chunks.reads_r @ start, chunks.pairs[:, CHUNK:], sources)
            _join(y_chunks, y[:, segment])
        ctx.save_for_backward(*inputs, torch.stack(starts))
        return y, S.reshape(state.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
        *inputs, starts = ctx.saved_tensors
        dS = dstate.flatten(0, 1)  # (B H, K, V)
        gradients = [torch.empty_like(x) for x in inputs]
        for segment, S in reversed(list(zip(_segments(dy), starts, strict=True))):
            parts = _split_all(inputs, segment, starts.dtype)
            *dparts, dS = _adjoint(parts, S, _split(dy[:, segment], starts.dtype), dS)
            for gradient, dpart in zip(gradients, dparts, strict=True):
                _join(dpart, gradient[:, segment])
        return *gradients, dS.reshape(dstate.shape)


def _states(chunks: _Chunks, S: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk (N, K, V), and after the last one; S (B H, K, V) is the first."""
    before = [S]
    for transition, arrival in zip(
        _by_time(chunks.transition, S), _by_time(chunks.arrival, S), strict=True
    ):
        before.append(torch.baddbmm(arrival, transition, before[-1]))
    return torch.cat(before[:-1]), before[-1]


def _sources(chunks: _Chunks, start: Tensor, v: Tensor) -> Tensor:
    """What is written along b and along k: u above v, (N, 2C, V)."""
    return torch.cat((torch.baddbmm(chunks.u_of_v, chunks.u_of_state, start), v), dim=1)


def _adjoint(parts: list[Tensor], S: Tensor, dy: Tensor, dS: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a segment's six inputs (N, C, K or V) and of its first state (B H, K, V).

    Differentiates the equations in `wkv7_torch`. The gradient of a log decay is the sum of all
    that passes its token: from before the chunk or a token in it, to a token in it or behind its
    end. As a difference of larger sums it would lose digits, hence float64 inside the chunk and a
    sum for each other way.
    """
    r, log_decay, k, v, a, b = parts
    C = v.shape[1]
    chunks = _chunks(r, log_decay, k, v, a, b)
    start, _ = _states(chunks, S)
    sources = _sources(chunks, start, v)

    direct = chunks.pairs[:, C:, :C].mT @ dy  # of u, through y alone
    dstart = torch.baddbmm(chunks.reads_r.mT @ dy, chunks.u_of_state.mT, direct)
    after = [dS]  # gradients of the states after each chunk, the last first
    for transition, through_y in zip(
        _by_time(chunks.transition, S)[::-1], _by_time(dstart, S)[::-1], strict=True
    ):
        after.append(torch.baddbmm(through_y, transition.mT, after[-1]))
    dend = torch.cat(after[-2::-1])  # (N, K, V)
    du = chunks.inverse.mT @ torch.baddbmm(direct, chunks.to_end[:, :C], dend)

    drows = torch.cat((du, dy), dim=1)  # (N, 2C, V)
    dpairs = (drows @ sources.mT).masked_fill_(_absent(C, v.device), 0.0).double()
    dreads = dpairs @ chunks.writes + drows @ start.mT  # (N, 2C, K)
    dwrites = dpairs.mT @ chunks.reads  # (N, 2C, K), for reads in the chunk
    dto_end = sources @ dend.mT  # (N, 2C, K), for the state after it
    dv = torch.baddbmm(chunks.to_end[:, C:] @ dend, chunks.pairs[:, :, C:].mT, drows)

    da, dr = dreads[:, :C] * chunks.decay_a, dreads[:, C:] * chunks.decay_r
    dboth = dwrites + dto_end * chunks.whole_decay.mT
    db, dk = dboth[:, :C] * chunks.growth, dboth[:, C:] * chunks.growth

    read_by_a, read_by_r = (dreads * chunks.reads).chunk(2, dim=1)  # (N, C, K)
    read_inside = (dwrites * chunks.writes).unflatten(1, (2, C)).sum(dim=1)
    taken_out = (dto_end * chunks.to_end).unflatten(1, (2, C)).sum(dim=1)
    carried = (start * dend).sum(dim=2)[:, None] * chunks.whole_decay.mT  # (N, 1, K)
    since = torch.ones(C, C, dtype=torch.float64, device=v.device).triu()  # [s, t]: t >= s
    before = torch.ones(C, C, dtype=v.dtype, device=v.device).tril(-1)
    # r reads a token's state after its decay, a before it.
    dlog_decay = since @ (read_by_r - read_inside + read_by_a) - read_by_a
    dlog_decay = dlog_decay + before @ taken_out + carried
    return dr, dlog_decay, dk, dv, da, db, after[-1]


def _segments(y: Tensor) -> list[slice]:
    """Pieces of T, each with so many chunks over all heads and batch rows as are in flight."""
    B, T, H, _ = y.shape
    in_flight = IN_FLIGHT if y.device.type == "cpu" else IN_FLIGHT_GPU
    length = CHUNK * max(1, in_flight // (B * H))
    return [slice(start, min(start + length, T)) for start in range(0, T, length)]


def _split_all(inputs: list[Tensor], segment: slice, dtype: torch.dtype) -> list[Tensor]:
    """A segment of r, log_decay, k, v, a, b in chunks: v in `dtype`, the others in float64."""
    dtypes = [torch.float64] * 3 + [dtype] + [torch.float64] * 2
    return [_split(x[:, segment], to) for x, to in zip(inputs, dtypes, strict=True)]


def _split(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S, H, K) -> (N, C, K): by time, then batch row, then head.

    The last chunk is filled with tokens of zeros, which leave the state as it is.
    """
    B, S, H, K = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -S % CHUNK)) if S % CHUNK else x
    x = x.reshape(B, -1, CHUNK, H, K).permute(1, 0, 3, 2, 4)  # (n, B, H, C, K)
    return x.to(dtype, memory_format=torch.contiguous_format).reshape(-1, CHUNK, K)


def _join(chunks: Tensor, out: Tensor) -> None:
    """The inverse of `_split`, into `out`."""
    B, S, H, K = out.shape
    chunks = chunks.reshape(-1, B, H, CHUNK, K).permute(1, 0, 3, 2, 4)  # (B, n, C, H, K)
    out.copy_(chunks.reshape(B, -1, H, K)[:, :S])


def _by_time(chunks: Tensor, S: Tensor) -> tuple[Tensor, ...]:
    """(N, ...) -> n times (B H, ...), by time; S (B H, K, V)."""
    return chunks.unflatten(0, (-1, len(S))).unbind(0)


def _kernels(r: Tensor, v: Tensor) -> ModuleType:
    """The module of the Triton kernels, for r (..., K) and v (..., V)."""
    K, V = r.shape[-1], v.shape[-1]
    if K != V or K not in KERNEL_SIZES:
        raise BackendUnavailableError(
            "wkv7: backend 'triton' has kernels for K = V of 16, 32, 64 and 128, and got "
            f"K = {K}, V = {V}; use 'torch'"
        )
    return kernels("wkv7", r)


def _validate(
    r: Tensor,
    log_decay: Tensor | None,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    decay_logits: Tensor | None,
) -> None:
    if r.ndim != 4 or r.shape[1] < 1:
        raise ValueError(f"wkv7: r must be (B, T, H, K) with T >= 1, got {tuple(r.shape)}")
    B, T, H, K = r.shape
    given = {"k": k, "a": a, "b": b, "log_decay": log_decay, "decay_logits": decay_logits}
    for name, x in given.items():
        if x is not None and x.shape != r.shape:
            raise ValueError(
                f"wkv7: {name} must have r's shape (B, T, H, K) = {tuple(r.shape)}, "
                f"got {tuple(x.shape)}"
            )
    if v.ndim != 4 or v.shape[:3] != (B, T, H):
        raise ValueError(
            f"wkv7: v must be (B, T, H, V) with B, T, H = {(B, T, H)}, got {tuple(v.shape)}"
        )
    expected = (B, H, K, v.shape[3])
    if state is not None and state.shape != expected:
        raise ValueError(f"wkv7: state must be (B, H, K, V) = {expected}, got {tuple(state.shape)}")
