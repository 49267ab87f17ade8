"""Causal attention forward on Hopper, in Gluon (see `attention_hopper_kernel`)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.constexpr_function
def product_layout(columns):
    """How the four warps of a warpgroup hold the product of one of its tiles."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def load(desc, i_b, i_h, i_row, full, tile):
    """Start to copy rows of a head, 0 behind its last; `full` completes when they are there."""
    mbarrier.expect(full, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [i_b, i_h, i_row, 0], full, tile)


@gluon.jit
def load_tiles(Q, K, V, place, q_tiles, q_full, stages, SHARED: gl.constexpr):
    """The partition that loads: the queries, then tiles of keys and values, the last first.

    Keys are a tile ahead of the values, as where they are used. A stage is filled for the n-th time
    once it was emptied n - 1 times. Of a barrier that has not completed, the parity before its
    first counts as completed: the first time waits for nothing.
    """
    i_b, i_h, t, first, stop = place
    k_tiles, v_tiles, k_full, v_full, k_empty, v_empty = stages
    ROWS: gl.constexpr = q_tiles.shape[3]
    STAGES: gl.constexpr = k_tiles.shape[0]
    KEYS: gl.constexpr = k_tiles.shape[3]
    i_kv = i_h // SHARED
    for i_group in gl.static_range(2):
        load(Q, i_b, i_h, t + i_group * ROWS, q_full.index(i_group), q_tiles.index(i_group))
    for i in range(stop - first + 1):
        if i < stop - first:
            i_k = i % STAGES
            mbarrier.wait(k_empty.index(i_k), (i // STAGES & 1) ^ 1)
            load(K, i_b, i_kv, (stop - 1 - i) * KEYS, k_full.index(i_k), k_tiles.index(i_k))
        if i > 0:
            i_v = (i - 1) % STAGES
            mbarrier.wait(v_empty.index(i_v), ((i - 1) // STAGES & 1) ^ 1)
            load(V, i_b, i_kv, (stop - i) * KEYS, v_full.index(i_v), v_tiles.index(i_v))


@gluon.jit
def start_scores(q_tile, k_tiles, i_stage):
    """Start the product of queries (ROWS, K) and a stage's keys: scores (ROWS, KEYS)."""
    ROWS: gl.constexpr = q_tile.shape[0]
    KEYS: gl.constexpr = k_tiles.shape[3]
    k_tile = k_tiles.index(i_stage).reshape([KEYS, q_tile.shape[1]]).permute((1, 0))
    none = gl.zeros([ROWS, KEYS], gl.float32, product_layout(KEYS))
    return warpgroup_mma(q_tile, k_tile, none, use_acc=False, is_async=True)


@gluon.jit
def start_values(total, weights, v_tiles, i_stage):
    """Start to add the product of weights (ROWS, KEYS) and a stage's values to (ROWS, K)."""
    KEYS: gl.constexpr = v_tiles.shape[3]
    K: gl.constexpr = v_tiles.shape[4]
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, product_layout(K), 2)
    weights = gl.convert_layout(weights.to(v_tiles.dtype), WEIGHTS)
    return warpgroup_mma(weights, v_tiles.index(i_stage).reshape([KEYS, K]), total, is_async=True)


@gluon.jit
def weigh(scores, peak, scale, newest, window, WINDOW: gl.constexpr, MASKED: gl.constexpr):
    """Weights of a tile (ROWS, KEYS), 2^(scale scores - new peak), the new peak, and their sums.

    Scores are scaled where they are exponentiated, in one multiply-add. A hidden score is -inf and
    the peak is finite, so that its weight is 0 even where a row sees nothing of the tile.
    """
    KEYS: gl.constexpr = scores.shape[1]
    if MASKED:
        o_key = gl.arange(0, KEYS, gl.SliceLayout(0, product_layout(KEYS)))[None, :]
        m_seen = o_key <= newest[:, None]
        if WINDOW:
            m_seen = m_seen & (o_key > (newest - window)[:, None])
        scores = gl.where(m_seen, scores, float("-inf"))
    peak = gl.maximum(peak, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - peak[:, None])
    return weights, peak, gl.sum(weights, 1)


@gluon.jit
def attend_tile(i, state, q_tile, stages, sight, WINDOW: gl.constexpr, MASKED: gl.constexpr):
    """The weights of tile i, while the values of tile i - 1, which are there, are added."""
    total, peak, norm, weights = state
    scale, newest, window = sight
    k_tiles, v_tiles, k_full, v_full, k_empty, v_empty = stages
    STAGES: gl.constexpr = k_tiles.shape[0]
    KEYS: gl.constexpr = k_tiles.shape[3]
    K: gl.constexpr = k_tiles.shape[4]
    i_stage, i_before, parity = i % STAGES, (i - 1) % STAGES, i // STAGES & 1
    mbarrier.wait(k_full.index(i_stage), parity)
    scores = start_scores(q_tile, k_tiles, i_stage)
    total = start_values(total, weights, v_tiles, i_before)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(i_stage))
    before = peak
    weights, peak, sums = weigh(scores, peak, scale, newest + i * KEYS, window, WINDOW, MASKED)
    shrink = gl.exp2(before - peak)
    norm = norm * shrink + sums
    # What the next tile needs is waited for here: the wait is a loop, and ptxas does not move the
    # exponentials across it. It would move them behind the product that they should overlap.
    mbarrier.wait(v_full.index(i_stage), parity)
    total = warpgroup_mma_wait(0, deps=(total,))
    mbarrier.arrive(v_empty.index(i_before))
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, product_layout(K)))[:, None]
    return total, peak, norm, weights


@gluon.jit
def attend(
    i_group: gl.constexpr,
    Y,
    p_lse,
    T,
    history,
    window,
    scale,
    place,
    q_tiles,
    q_full,
    stages,
    WINDOW: gl.constexpr,
):
    """A partition that computes: one tile of queries against tiles of keys, the last first."""
    i_b, i_h, t, first, stop = place
    k_tiles, v_tiles, k_full, v_full, k_empty, _ = stages
    ROWS: gl.constexpr = q_tiles.shape[3]
    K: gl.constexpr = q_tiles.shape[4]
    STAGES: gl.constexpr = k_tiles.shape[0]
    KEYS: gl.constexpr = k_tiles.shape[3]
    ROW: gl.constexpr = gl.SliceLayout(1, product_layout(KEYS))
    t += i_group * ROWS
    tiles = stop - first
    o_row = gl.arange(0, ROWS, ROW)
    newest = history + t + o_row - (stop - 1) * KEYS  # key of the last tile that a row sees
    # Every row sees all keys of the tiles masked_to <= i < masked_from.
    masked_to = gl.maximum(gl.minimum(stop - (history + t + 1) // KEYS, tiles), 1)
    masked_from = tiles
    if WINDOW:
        hidden = gl.maximum(history + t + ROWS - 1 - window + KEYS, 0) // KEYS
        masked_from = gl.maximum(stop - hidden, masked_to)

    q_tile = q_tiles.index(i_group).reshape([ROWS, K])
    mbarrier.wait(q_full.index(i_group), 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma_wait(0, deps=(start_scores(q_tile, k_tiles, 0),))
    mbarrier.arrive(k_empty.index(0))
    peak = gl.full([ROWS], -1e30, gl.float32, ROW)
    weights, peak, norm = weigh(scores, peak, scale, newest, window, WINDOW, True)
    mbarrier.wait(v_full.index(0), 0)
    total = gl.zeros([ROWS, K], gl.float32, product_layout(K))
    state, sight = (total, peak, norm, weights), (scale, newest, window)
    for i in range(1, masked_to):
        state = attend_tile(i, state, q_tile, stages, sight, WINDOW, True)
    for i in range(masked_to, masked_from):
        state = attend_tile(i, state, q_tile, stages, sight, WINDOW, False)
    if WINDOW:
        for i in range(masked_from, tiles):
            state = attend_tile(i, state, q_tile, stages, sight, WINDOW, True)
    total, peak, norm, weights = state
    total = start_values(total, weights, v_tiles, (tiles - 1) % STAGES)
    total = warpgroup_mma_wait(0, deps=(total,))

    gl.store(p_lse + t + o_row, peak + gl.log2(norm), t + o_row < T)
    y = total / gl.convert_layout(norm, gl.SliceLayout(1, product_layout(K)))[:, None]
    q_tile.store(y.to(q_tile.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(Y, [i_b, i_h, t, 0], q_tiles.index(i_group))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "S", "H", "window"])
def attention_hopper_forward_kernel(
    Q,  # (B, H, T, K) in blocks of (1, 1, ROWS, K)
    K,  # (B, H_kv, S, K) in blocks of (1, 1, KEYS, K)
    V,  # likewise
    Y,  # (B, H, T, K) in Q's blocks
    LSE,  # (B, H, T)
    T,
    S,
    H,
    window,
    scale,
    SHARED: gl.constexpr,  # query heads of a key head
    WINDOW: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Two tiles of queries of one head, each in a partition of its own, and a third that loads."""
    ROWS: gl.constexpr = Q.block_type.shape[2]
    KEYS: gl.constexpr = K.block_type.shape[2]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(Q.dtype, [2] + Q.block_type.shape, Q.layout)
    k_tiles = gl.allocate_shared_memory(K.dtype, [STAGES] + K.block_type.shape, K.layout)
    v_tiles = gl.allocate_shared_memory(V.dtype, [STAGES] + V.block_type.shape, V.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    blocks = gl.cdiv(T, 2 * ROWS)
    pid = gl.program_id(0)
    i_bh = pid // blocks
    t = (blocks - 1 - pid % blocks) * (2 * ROWS)  # those that see the most keys first
    history = S - T
    stop = gl.cdiv(gl.minimum(history + t + 2 * ROWS, S), KEYS)
    first = 0
    if WINDOW:
        first = gl.maximum(history + t + 1 - window, 0) // KEYS
    p_lse = LSE + i_bh.to(gl.int64) * T
    place = (i_bh // H, i_bh % H, t, first, stop)
    stages = (k_tiles, v_tiles, k_full, v_full, k_empty, v_empty)
    shared = (Y, p_lse, T, history, window, scale, place, q_tiles, q_full, stages, WINDOW)
    gl.warp_specialize(
        [
            (attend, (0,) + shared),
            (attend, (1,) + shared),
            (load_tiles, (Q, K, V, place, q_tiles, q_full, stages, SHARED)),
        ],
        [4, 1],
        [240, 24],
    )
