"""State space dual (SSD): a linear recurrence with one scalar decay a head and token.

Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, sections 5 and 6 (Mamba-2). Linear
attention and RetNet are the same operation with a zero or constant log-decay.

    S_t = exp(log_decay_t) S_{t-1} + (dt_t x_t) b_t^T
    y_t = S_t c_t + skip * x_t

Letters: B batch, T tokens, H heads, P head dimension, N state dimension, G groups of heads that
share b and c; Q chunk length, M matrices in a batched product.
"""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from archs.ops import Backend, BackendUnavailableError, in_its_own_types, kernels, no_such_backend
from archs.ops.plan import Plan, segments_that_fill

CHUNK = 64  # Q: the fastest of 32, 64 and 128 measured on an AVX-512 CPU at P = N = 64
BLOCK = 8  # tokens in a block of `_pairwise_decay`; divides every chunk
SEGMENT_SIZE = 2**20  # elements of a working tensor on a CPU; the fastest of 2**17 to 2**22 there

KERNEL_SIZES = (16, 32, 64, 128)  # of P and N in the Triton kernels


def plan(shape: tuple[int, int, int, int], device: torch.device | str) -> Plan:
    """The plan for x of a shape (B, T, H, P): one pass has a program a head, two at P = 128."""
    B, T, H, P = shape
    return segments_that_fill(B * H * max(1, P // 64), T, device)


def ssd_step(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    dt: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence.

    x (B, H, P); log_decay, dt (B, H); b, c (B, G, N); state (B, H, P, N); skip (H,)
    -> y (B, H, P) in x's dtype, the next state in the state's dtype.
    """
    B, H, _ = x.shape
    _, G, N = b.shape
    wide = state.dtype
    b, c = (t.to(wide)[:, :, None].expand(B, G, H // G, N).reshape(B, H, N) for t in (b, c))
    u = x.to(wide) if dt is None else x.to(wide) * dt.to(wide)[:, :, None]  # (B, H, P)
    decay = log_decay.to(wide).exp()[:, :, None, None]  # (B, H, 1, 1)
    state = decay * state + u[:, :, :, None] * b[:, :, None, :]  # (B, H, P, N)
    y = (state @ c[:, :, :, None]).squeeze(3)  # (B, H, P)
    if skip is not None:
        y = y + skip.to(wide)[:, None] * x.to(wide)
    return y.to(x.dtype), state


def ssd_reference(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    dt: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The fold of `ssd_step` over time; arguments as `ssd`, state required."""
    ys = []
    for t in range(x.shape[1]):
        dt_t = None if dt is None else dt[:, t]
        y_t, state = ssd_step(x[:, t], log_decay[:, t], b[:, t], c[:, t], state, dt_t, skip)
        ys.append(y_t)
    return torch.stack(ys, dim=1), state


def ssd_torch(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    dt: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunked form (section 6): products within chunks of Q tokens, states between chunks.

    Arguments as `ssd`, state required. Work is linear in T; the backward pass keeps the inputs
    and a state a segment, and recomputes the rest.
    """
    B, T, H, P = x.shape
    G, N = b.shape[2:]
    R = H // G  # heads a group
    chunk = min(CHUNK, -(-T // BLOCK) * BLOCK)
    padding = -T % chunk
    dt = torch.ones_like(log_decay) if dt is None else dt
    if skip is not None:
        skip = skip.to(state.dtype).view(1, G, R).expand(B, G, R).reshape(B * G, R)

    def by_group(tensor: Tensor, *sizes: int) -> Tensor:
        """(B, T, G * ...) -> (B * G, T + padding, ...): groups are as independent as rows."""
        tensor = tensor.view(B, T, G, *sizes).transpose(1, 2).reshape(B * G, T, *sizes)
        return F.pad(tensor, (0, 0) * len(sizes) + (0, padding)) if padding else tensor

    state = state.reshape(B * G, R, P, N).permute(0, 3, 1, 2)  # (B * G, N, R, P)
    y, state = _ChunkedSSD.apply(
        by_group(x, R, P),
        by_group(log_decay, R),
        by_group(dt, R),
        by_group(b, N),
        by_group(c, N),
        state,
        skip,
        chunk,
    )
    y = y[:, :T].view(B, G, T, R, P).transpose(1, 2).reshape(B, T, H, P)
    return y, state.permute(0, 2, 3, 1).reshape(B, H, P, N)


def ssd_triton(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None,
    dt: Tensor | None = None,
    skip: Tensor | None = None,
    chosen: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Our Triton kernels; arguments as `ssd`, `chosen` its plan."""
    module = _kernels(x, b)
    B, T, H, P = x.shape
    chosen = plan((B, T, H, P), x.device) if chosen is None else chosen
    if chosen.segments < 1:
        raise ValueError(f"ssd: a plan has one segment at least, got {chosen.segments}")
    inputs = (x, log_decay, b.to(x.dtype), c.to(x.dtype), state, dt, skip)
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, end, _ = module.ssd_op(*inputs, chosen.segments, state is not None, keeps)
    return y, None if state is None else end


def ssd_step_triton(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    dt: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd_step` as a Triton kernel."""
    module = _kernels(x, b)
    return module.ssd_step_op(x, log_decay, b.to(x.dtype), c.to(x.dtype), state, dt, skip)


@in_its_own_types
def ssd(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    *,
    dt: Tensor | None = None,
    skip: Tensor | None = None,
    plan: Plan | None = None,
    backend: Backend,
) -> tuple[Tensor, Tensor | None]:
    """State space dual: a linear recurrence over outer products with a scalar decay.

    Args:
        x: (B, T, H, P), T >= 1.
        log_decay: (B, T, H), the logarithm of each token's decay, at most 0 in practice.
        b: (B, T, G, N), what the state is written along; H % G == 0.
        c: (B, T, G, N), what the state is read along.
        state: (B, H, P, N), the state before x; None means zeros.
        dt: (B, T, H), multiplies x where it enters the state; None means 1.
        skip: (H,), multiplies x where it is added to y; None means 0.
        plan: the variant of the Triton kernels; None means what `archs.ops.ssd.plan` chooses.
        backend: "reference", "torch" or "triton" (P and N of 16, 32, 64 or 128; products of b, c
            and x are formed in x's dtype).

    Returns:
        y (B, T, H, P) in x's dtype, and the state after x exactly when one was passed in, in
        float32 (float64 for float64 x); all sums are formed in that type.

    Raises:
        ValueError: shapes do not fit, the backend is unknown, or has no plans.
        BackendUnavailableError: the backend cannot run here.
    """
    _validate(x, log_decay, b, c, state, dt, skip)
    B, _, H, P = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    state = None if state is None else state.to(wide)
    if backend == "triton":
        return ssd_triton(x, log_decay, b, c, state, dt, skip, plan)
    if plan is not None:
        raise ValueError(f"ssd: plan is for backend 'triton', got backend {backend!r}")
    start = state
    if start is None:
        start = torch.zeros(B, H, P, b.shape[3], dtype=wide, device=x.device)
    if backend == "reference":
        y, end = ssd_reference(x, log_decay, b, c, start, dt, skip)
    elif backend == "torch":
        y, end = ssd_torch(x, log_decay, b, c, start, dt, skip)
    else:
        raise no_such_backend("ssd", backend)
    return y, None if state is None else end


class _Segment:
    """n whole chunks of one group's tokens in the working type, and their decays.

    Chunks come before batch rows, so that the states of successive chunks lie behind each other.
    """

    def __init__(self, inputs: tuple[Tensor, ...], span: slice, chunk: int) -> None:
        wide = torch.promote_types(inputs[0].dtype, torch.float32)
        x, log_decay, dt, b, c = (_in_chunks(t[:, span], chunk).to(wide) for t in inputs)
        n, B, Q, H, P = x.shape
        N = b.shape[3]
        self.sizes = n, B, Q, H, P, N
        self.x, self.log_decay, self.dt = x, log_decay, dt  # (n, B, Q, H, P), (n, B, Q, H) twice
        self.b, self.c = b.reshape(n * B, Q, N), c.reshape(n * B, Q, N)
        self.from_start = _flush(log_decay.cumsum(dim=2).exp())  # (n, B, Q, H): up to and with t
        self.to_end = _flush(_sum_after(log_decay, dim=2).exp())  # (n, B, Q, H): after t
        self.whole = self.from_start[:, :, -1]  # (n, B, H)
        self.scores = torch.bmm(self.c, self.b.transpose(1, 2))  # (n B, Q, Q), shared by heads

    def written(self) -> Tensor:
        """What each token adds along b to the state that leaves its chunk: (n B, Q, H P)."""
        n, B, Q, H, P, _ = self.sizes
        return _product(self.x, (self.dt * self.to_end)[..., None]).reshape(n * B, Q, H * P)

    def states(self, state: Tensor, written: Tensor) -> Tensor:
        """The states before, between and after the chunks: (n + 1, B, N, H, P)."""
        n, B, _, H, P, N = self.sizes
        states = written.new_empty(n + 1, B, N, H, P)
        states[0] = state
        torch.bmm(self.b.transpose(1, 2), written, out=states[1:].view(n * B, N, H * P))
        for i in range(n):
            states[i + 1].addcmul_(self.whole[i, :, None, :, None], states[i])
        return states

    def decay(self) -> Tensor:
        """Decay from token s to token t of the same chunk and head: (n B, H, Q, Q)."""
        n, B, Q, H, _, _ = self.sizes
        by_head = self.log_decay.transpose(2, 3).reshape(-1, Q)
        return _pairwise_decay(by_head).view(n * B, H, Q, Q)

    def u_by_head(self) -> Tensor:
        """dt_t x_t, heads before tokens: (n B H, Q, P)."""
        _, _, Q, _, P, _ = self.sizes
        by_head = _product(self.x.transpose(2, 3), self.dt.transpose(2, 3)[..., None])
        return by_head.reshape(-1, Q, P)


class _ChunkedSSD(torch.autograd.Function):
    """One group: x (B, T, H, P), b, c (B, T, N), state (B, N, H, P), T a multiple of the chunk.

    The backward pass recomputes each segment from the state that enters it, last segment first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_decay: Tensor,
        dt: Tensor,
        b: Tensor,
        c: Tensor,
        state: Tensor,
        skip: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.chunk = chunk
        ctx.spans = _spans(x, b.shape[2], chunk)
        entering = []  # the state before each segment
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for span in ctx.spans:
            entering.append(state)
            part = _Segment((x, log_decay, dt, b, c), span, chunk)
            n, B, Q, H, P, N = part.sizes
            states = part.states(state, part.written())
            state = states[n].clone()
            past = torch.bmm(part.c, states[:n].view(n * B, N, H * P)).view(n, B, Q, H, P)
            past *= part.from_start[..., None]
            if skip is not None:
                past.addcmul_(part.x, skip[:, None, :, None])
            mixing = part.decay()
            mixing *= part.scores[:, None]
            within = torch.bmm(mixing.view(-1, Q, Q), part.u_by_head())
            past += within.view(n, B, H, Q, P).transpose(2, 3)
            _in_chunks(y[:, span], Q).copy_(past)
        ctx.save_for_backward(x, log_decay, dt, b, c, skip, *entering)
        ctx.set_materialize_grads(False)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, (skip, *entering) = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        dstate = torch.zeros_like(entering[0]) if dstate is None else dstate
        dy = torch.zeros_like(inputs[0]) if dy is None else dy
        grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs]
        dskip = None if skip is None else torch.zeros_like(skip)
        for span, state in zip(reversed(ctx.spans), reversed(entering), strict=True):
            part = _Segment(inputs, span, ctx.chunk)
            n, B, Q, H, P, N = part.sizes
            dx, dlog_decay, ddt, db, dc = (_in_chunks(t[:, span], Q) for t in grads)
            dout = _in_chunks(dy[:, span], Q).to(part.x.dtype)  # (n, B, Q, H, P)

            # Through the states that the chunks hand over.
            written = part.written()
            states = part.states(state, written)[:n]
            read = _product(dout, part.from_start[..., None]).reshape(n * B, Q, H * P)
            dstates = torch.empty(n + 1, *state.shape, dtype=state.dtype, device=state.device)
            dstates[n] = dstate
            torch.bmm(part.c.transpose(1, 2), read, out=dstates[:n].view(n * B, N, H * P))
            for i in reversed(range(n)):
                dstates[i].addcmul_(part.whole[i, :, None, :, None], dstates[i + 1])
            dstate = dstates[0].clone()
            dstates = dstates[1:]
            along_state = (states * dstates).sum(dim=(2, 4)) * part.whole  # (n, B, H)
            states = states.view(n * B, N, H * P)
            dstates = dstates.view(n * B, N, H * P)
            dc_part = torch.bmm(read, states.transpose(1, 2))  # (n B, Q, N)
            db_part = torch.bmm(written, dstates.transpose(1, 2))  # (n B, Q, N)
            past = torch.bmm(part.c, states)
            past *= read
            along_read = past.view(n, B, Q, H, P).sum(dim=4)  # (n, B, Q, H)
            du = torch.bmm(part.b, dstates).view(n, B, Q, H, P)
            du *= part.to_end[..., None]
            along_written = (du * part.x).sum(dim=4) * part.dt  # (n, B, Q, H)

            # Through the products within the chunks.
            decay = part.decay()  # (n B, H, Q, Q)
            dout_by_head = dout.transpose(2, 3).reshape(-1, Q, P)
            dmixing = torch.bmm(dout_by_head, part.u_by_head().transpose(1, 2))
            dmixing = dmixing.view(n * B, H, Q, Q)
            dmixing *= decay
            dscores = dmixing.sum(dim=1)  # (n B, Q, Q)
            decay *= part.scores[:, None]
            du_within = torch.bmm(decay.view(-1, Q, Q).transpose(1, 2), dout_by_head)
            du += du_within.view(n, B, H, Q, P).transpose(2, 3)
            dmixing *= part.scores[:, None]  # by token t read and token s written
            # Paths from s <= k to t > k, which cross the decay of token k + 1.
            along_within = dmixing.cumsum_(dim=3).tril_(-1).sum(dim=2)  # (n B, H, Q)
            along_within = F.pad(along_within, (1, -1)).view(n, B, H, Q).transpose(2, 3)

            # A decay multiplies every path that crosses its token: sums, without a difference.
            crossing = _sum_from(along_read, dim=2) + _sum_before(along_written, dim=2)
            crossing += along_within
            crossing += along_state[:, :, None]
            dlog_decay.copy_(crossing)
            dc.copy_(dc_part.baddbmm_(dscores, part.b).view(n, B, Q, N))
            db.copy_(db_part.baddbmm_(dscores.transpose(1, 2), part.c).view(n, B, Q, N))
            if ctx.needs_input_grad[2]:
                ddt.copy_((du * part.x).sum(dim=4))
            du *= part.dt[..., None]
            if skip is not None and dskip is not None:
                du.addcmul_(dout, skip[:, None, :, None])
                dskip += (dout * part.x).sum(dim=(0, 2, 4))
            dx.copy_(du)
        return *grads, dstate, dskip, None


def _kernels(x: Tensor, b: Tensor) -> ModuleType:
    """The module of the Triton kernels, for x (..., P) and b (..., N)."""
    P, N = x.shape[-1], b.shape[-1]
    if P not in KERNEL_SIZES or N not in KERNEL_SIZES:
        raise BackendUnavailableError(
            "ssd: backend 'triton' has kernels for P and N of 16, 32, 64 and 128, and got "
            f"P = {P}, N = {N}; use 'torch'"
        )
    return kernels("ssd", x)


def _spans(x: Tensor, d_state: int, chunk: int) -> list[slice]:
    """Segments of whole chunks; on a CPU so short that a segment's tensors stay in the cache."""
    B, T, H, P = x.shape
    if x.device.type != "cpu":
        return [slice(0, T)]
    a_chunk = B * H * max(chunk * P, chunk * chunk, d_state * P)
    tokens = chunk * max(1, SEGMENT_SIZE // a_chunk)
    return [slice(start, min(start + tokens, T)) for start in range(0, T, tokens)]


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, n Q, ...) -> (n, B, Q, ...), a view."""
    return x.unflatten(1, (-1, chunk)).transpose(0, 1)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """The product in row-major layout, whatever the strides of x."""
    return torch.mul(x, y, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))


def _sum_from(x: Tensor, dim: int) -> Tensor:
    """Sums from each element to the last."""
    return x.flip(dim).cumsum(dim).flip(dim)


def _sum_after(x: Tensor, dim: int) -> Tensor:
    """Sums after each element to the last, without subtracting the element."""
    first_gone = x.narrow(dim, 1, x.shape[dim] - 1)
    return torch.cat([_sum_from(first_gone, dim), torch.zeros_like(x.narrow(dim, 0, 1))], dim)


def _sum_before(x: Tensor, dim: int) -> Tensor:
    """Sums from the first to before each element, without subtracting the element."""
    last_gone = x.narrow(dim, 0, x.shape[dim] - 1)
    return torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), last_gone.cumsum(dim)], dim)


def _segment_sums(x: Tensor) -> Tensor:
    """Element [..., t, s] is the sum of x over s < k <= t, -inf where s > t."""
    Q = x.shape[-1]
    ones = torch.ones(Q, Q, dtype=torch.bool, device=x.device)
    sums = torch.where(ones.tril(-1), x[..., :, None], 0).cumsum(dim=-2)
    return sums.masked_fill(ones.triu(1), -torch.inf)


def _pairwise_decay(log_decay: Tensor) -> Tensor:
    """Product of the decays over s < k <= t at [:, t, s], 0 where s > t: (M, Q) -> (M, Q, Q).

    A product of three factors: from t's block, from the blocks between, from s's block. No factor
    is a quotient, so that nothing cancels or overflows whatever the decays.
    """
    M, Q = log_decay.shape
    blocks = log_decay.view(M, Q // BLOCK, BLOCK)
    from_start = blocks.cumsum(dim=2).exp()
    to_end = _sum_after(blocks, dim=2).exp()
    between = _segment_sums(blocks.sum(dim=2))[:, :-1].exp()
    between = F.pad(between, (0, 0, 1, 0))  # (M, Q/8, Q/8)
    from_s = between[:, :, :, None] * to_end[:, None]  # (M, Q/8, Q/8, 8)
    decay = from_start[:, :, :, None, None] * from_s[:, :, None]  # (M, Q/8, 8, Q/8, 8)
    own_block = _segment_sums(blocks).exp()  # (M, Q/8, 8, 8)
    decay.diagonal(dim1=1, dim2=3).copy_(own_block.permute(0, 2, 3, 1))
    return _flush(decay.view(M, Q, Q))


def _flush(decay: Tensor) -> Tensor:
    """Set decays to zero, in place, whose products with ordinary numbers would be subnormal.

    Arithmetic on subnormal numbers is tens of times slower on a CPU.
    """
    limits = torch.finfo(decay.dtype)
    return torch.threshold_(decay, limits.tiny / limits.eps, 0.0)


def _validate(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None,
    dt: Tensor | None,
    skip: Tensor | None,
) -> None:
    if x.ndim != 4 or x.shape[1] < 1:
        raise ValueError(f"ssd: x must be (B, T, H, P) with T >= 1, got {tuple(x.shape)}")
    B, T, H, P = x.shape
    if b.ndim != 4 or b.shape[:2] != (B, T) or H % b.shape[2]:
        raise ValueError(
            f"ssd: b must be (B, T, G, N) with B = {B}, T = {T} and G a divisor of H = {H}, "
            f"got {tuple(b.shape)}"
        )
    N = b.shape[3]
    for name, tensor, letters, shape in (
        ("log_decay", log_decay, "(B, T, H)", (B, T, H)),
        ("c", c, "b's (B, T, G, N)", tuple(b.shape)),
        ("state", state, "(B, H, P, N)", (B, H, P, N)),
        ("dt", dt, "(B, T, H)", (B, T, H)),
        ("skip", skip, "(H,)", (H,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"ssd: {name} must be {letters} = {shape}, got {tuple(tensor.shape)}")
