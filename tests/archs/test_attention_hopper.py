"""The Hopper path of attention: emulated, compiled without a GPU, and run where there is one."""

import math
import multiprocessing
import re
import runpy
import sys
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

import pytest
import torch

import archs.ops
from archs.ops.attention import AttentionPlan, attention
from gluon_emulator import DeadlockError, EmulatedKernel, RaceError
from harness import compiled, pretend
from kernel_checks import CAPS, guarded_allocations, in_margins, relative_rms

pytest.importorskip("triton")
from archs.ops import attention_hopper_kernel as hopper

if hopper.MISSING:
    pytest.skip(hopper.MISSING, allow_module_level=True)
from archs.ops import attention_hopper_forward_kernel as kernels

KERNEL = "attention_hopper_forward_kernel"


def inputs(B, T, S, H, H_kv, K, dtype=torch.bfloat16, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, K), (B, S, H_kv, K), (B, S, H_kv, K)
    return tuple(torch.randn(s, generator=generator).to(device, dtype) for s in shapes)


def dense(q, k, v, window):
    """y and lse (base 2) in float64, from all scores at once."""
    T, S, shared = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(shared, 2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q.double(), k) * (
        math.log2(math.e) / q.shape[3] ** 0.5
    )
    age = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    seen = (age >= 0) & (age < (window or S))
    lse = torch.logsumexp(scores.masked_fill(~seen, -torch.inf) * math.log(2), -1) / math.log(2)
    weights = torch.exp2(scores - lse[..., None]) * seen
    return torch.einsum("bhts,bshk->bthk", weights, v), lse


def emulated(q, k, v, window=None, seed=0, edits=()):
    kernel = EmulatedKernel(kernels, KERNEL, seed, edits)
    with (
        pretend.gpu(90),
        patch.object(archs.ops, "interpreted", lambda: False),
        patch.object(hopper, KERNEL, kernel),
        guarded_allocations(),
    ):
        return hopper.attention_hopper(q, k, v, window)


def assert_right(found, q, k, v, window):
    y, lse = dense(q, k, v, window)
    assert found[0].dtype == q.dtype
    assert found[1].dtype == torch.float32
    assert found[0].shape == y.shape
    assert found[1].shape == lse.shape
    assert relative_rms(found[0], y) <= CAPS[q.dtype]
    assert (found[0].double() - y).abs().max() <= 10 * CAPS[q.dtype]
    assert (found[1].double() - lse).abs().max() <= 1e-5 * max(1, lse.abs().max())


CASES = [
    # B, T, S, H, H_kv, window
    (1, 1, 1, 1, 1, None),
    (1, 1, 200, 2, 1, None),
    (2, 17, 17, 2, 2, None),
    (1, 128, 128, 2, 1, None),
    (1, 129, 129, 1, 1, None),
    (1, 300, 300, 2, 1, None),
    (2, 70, 300, 4, 2, None),
    (1, 150, 701, 1, 1, None),
    (1, 300, 300, 2, 1, 1),
    (1, 300, 300, 1, 1, 50),
    (1, 300, 300, 1, 1, 128),
    (1, 150, 701, 1, 1, 200),
    (1, 64, 701, 2, 1, 333),
    (1, 17, 17, 1, 1, 17),
    # Where a tile more or less is masked, or loaded.
    (1, 70, 196, 1, 1, None),
    (1, 300, 300, 1, 1, 130),
    (1, 300, 300, 1, 1, 191),
]


@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize(("B", "T", "S", "H", "H_kv", "window"), CASES)
def test_values_under_any_schedule(B, T, S, H, H_kv, window, K):
    q, k, v = inputs(B, T, S, H, H_kv, K)
    first = emulated(q, k, v, window)
    assert_right(first, q, k, v, window)
    for seed in range(1, 4):
        again = emulated(q, k, v, window, seed)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_float16():
    q, k, v = inputs(1, 140, 270, 2, 1, 64, torch.float16)
    assert_right(emulated(q, k, v, 99), q, k, v, 99)


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(sign):
    q, k, v = inputs(1, 140, 140, 1, 1, 64)
    q, k = 30 * q.abs(), sign * k.abs()
    assert_right(emulated(q, k, v), q, k, v, None)


def test_nothing_behind_the_keys_is_read():
    """In a cache longer than its keys, and in the next batch row."""
    q, k, v = inputs(2, 20, 140, 2, 2, 64)
    expected = emulated(q, k, v)
    caches = [torch.full((2, 500, 2, 64), torch.nan, dtype=x.dtype) for x in (k, v)]
    for cache, x in zip(caches, (k, v), strict=True):
        cache[:, :140] = x
    found = emulated(q, *(cache[:, :140] for cache in caches))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    k[1], v[1] = torch.nan, torch.nan
    found = emulated(q, k, v)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, expected, strict=True))
    assert found[0][1].isnan().all()


def test_any_order_of_dimensions():
    q, k, v = inputs(2, 20, 140, 2, 2, 64)
    expected = emulated(q, k, v)
    turned = [in_margins(x.transpose(1, 2).contiguous()).transpose(1, 2) for x in (q, k, v)]
    found = emulated(*turned)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_window_hides_what_is_older():
    q, k, v = inputs(1, 10, 400, 1, 1, 64)
    expected = emulated(q, k, v, 100)
    k[:, :128], v[:, :128] = torch.nan, torch.nan  # a whole tile: not even loaded
    found = emulated(q, k, v, 100)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


K_RELEASED = "mbarrier.arrive(k_empty.index(i_stage))"
V_RELEASED = "mbarrier.arrive(v_empty.index(i_before))"
K_DONE = "scores = warpgroup_mma_wait(1, deps=(scores,))"
V_DONE = "total = warpgroup_mma_wait(0, deps=(total,))"
MUTATIONS = {
    "keys released before they are read": (
        f"{K_DONE}\n    {K_RELEASED}",
        f"{K_RELEASED}\n    {K_DONE}",
    ),
    "values released before they are read": (
        f"{V_DONE}\n    {V_RELEASED}",
        f"{V_RELEASED}\n    {V_DONE}",
    ),
    "keys never released": (K_RELEASED, "pass"),
    "released twice": (V_RELEASED, f"{V_RELEASED}; {V_RELEASED}"),
    "released by one of two": (
        "init(k_empty.index(i), count=2)",
        "init(k_empty.index(i), count=1)",
    ),
    "parity of full keys": (
        "wait(k_full.index(i_stage), parity)",
        "wait(k_full.index(i_stage), parity ^ 1)",
    ),
    "parity of full values": (
        "wait(v_full.index(i_stage), parity)",
        "wait(v_full.index(i_stage), parity ^ 1)",
    ),
    "parity of empty keys": ("(i // STAGES & 1) ^ 1", "i // STAGES & 1"),
    "parity of empty values": ("((i - 1) // STAGES & 1) ^ 1", "(i - 1) // STAGES & 1"),
    "parity that never changes": ("i // STAGES & 1\n", "0\n"),
    "full keys not waited for": ("mbarrier.wait(k_full.index(i_stage), parity)", "pass"),
    "full values not waited for": ("mbarrier.wait(v_full.index(i_stage), parity)", "pass"),
    "first keys not waited for": ("mbarrier.wait(k_full.index(0), 0)", "pass"),
    "first values not waited for": ("mbarrier.wait(v_full.index(0), 0)", "pass"),
    "queries not waited for": ("mbarrier.wait(q_full.index(i_group), 0)", "pass"),
    "empty keys not waited for": ("mbarrier.wait(k_empty", "(k_empty"),
    "empty values not waited for": ("mbarrier.wait(v_empty", "(v_empty"),
    "scores not waited for": ("warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,"),
    "values not waited for": (
        f"{V_DONE}\n    {V_RELEASED}",
        f"{V_DONE.replace('(0', '(1')}\n    {V_RELEASED}",
    ),
    "fewer bytes expected": ("block_type.nbytes)", "block_type.nbytes // 2)"),
    "more bytes expected": ("block_type.nbytes)", "block_type.nbytes * 2)"),
    "barriers not fenced": ("count=2)\n    fence_async_shared()", "count=2)\n    pass"),
    "results not fenced": ("q_tile.dtype))\n    fence_async_shared()", "q_tile.dtype))\n    pass"),
    "results not stored at the end": ("tma.store_wait(0)", "pass"),
    "the wrong stage": (
        "start_values(total, weights, v_tiles, i_before)",
        "start_values(total, weights, v_tiles, i_stage)",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_emulator_notices(mutation):
    """What a schedule must be unlucky for to show, it finds in one of a few."""
    q, k, v = inputs(1, 128, 700, 1, 1, 64)
    for seed in range(20):
        try:
            found = emulated(q, k, v, seed=seed, edits=[MUTATIONS[mutation]])
        except (RaceError, DeadlockError):
            return
        if not torch.equal(*(x.nan_to_num(nan=1e9) for x in (found[0], emulated(q, k, v)[0]))):
            return
    pytest.fail("not noticed")


def test_a_loop_without_end_is_noticed():
    """Nobody can go on: the message says what each waits for."""
    edit = ("mbarrier.arrive(k_empty.index(i_stage))", "pass")
    with pytest.raises(DeadlockError, match=r"load_tiles 2 waits for .*parity.*Barrier"):
        emulated(*inputs(1, 1, 700, 1, 1, 64), edits=[edit])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v: (q.float(), k.float(), v.float()), "takes float16 or bfloat16"),
        (lambda q, k, v: (q, k.half(), v), "one for all"),
        (lambda q, k, v: (q[..., :32], k[..., :32], v[..., :32]), "head sizes 64 and 128, got 32"),
        (
            lambda q, k, v: (q, k, torch.cat((v, v[..., :4]), -1)[..., :64]),
            "v must start, and step",
        ),
        (lambda q, k, v: (q, k.transpose(1, 3).contiguous().transpose(1, 3), v), "k must start"),
        (lambda q, k, v: (q[:, :1].expand(-1, 5, -1, -1), k, v), "q must start"),
    ],
)
def test_what_it_cannot_take(change, reason):
    q, k, v = change(*inputs(1, 5, 9, 2, 2, 64))
    with pretend.gpu(90), patch.object(archs.ops, "interpreted", lambda: False):
        assert reason in hopper.refusal(q, k, v)
        with pytest.raises(ValueError, match=f"attention on Hopper: .*{reason}"):
            hopper.attention_hopper(q, k, v, None)


def test_where_it_cannot_run():
    q, k, v = inputs(1, 5, 9, 2, 2, 64)
    with patch.object(archs.ops, "interpreted", lambda: True):
        assert hopper.refusal(q, k, v) == "Triton's interpreter does not run Gluon"
    with patch.object(archs.ops, "interpreted", lambda: False):
        assert "q is on cpu" in hopper.refusal(q, k, v)
        with pretend.gpu(100):
            assert "has 10.0" in hopper.refusal(q, k, v)
        with pretend.gpu(90):
            assert hopper.refusal(q, k, v) is None
            with patch.object(hopper, "MISSING", "Triton 3.5 lacks it"):
                assert hopper.refusal(q, k, v) == "Triton 3.5 lacks it"


def test_a_triton_without_gluon():
    with patch.dict(sys.modules, {"triton.experimental.gluon.nvidia.hopper": None}):
        module = runpy.run_path(hopper.__file__)
    q, k, v = inputs(1, 5, 9, 2, 2, 64)
    reason = module["refusal"](q, k, v)
    assert re.search(r"Triton \d.* lacks what it is written in: .*gluon\.nvidia\.hopper", reason)
    with pytest.raises(ValueError, match="lacks"):
        module["attention_hopper"](q, k, v, None)


def compile_call(K, dtype, window):
    """What one call compiles for sm_90, and its disassembly."""
    listings, q = [], torch.zeros(1, 256, 2, K, dtype=dtype)

    def kept(listing, instructions=compiled._instructions):
        listings.append(listing)
        return instructions(listing)

    with pretend.gpu(90), patch.object(compiled, "_instructions", kept):
        (row,) = compiled.compile_launches(lambda: hopper.attention_hopper(q, q, q, window), 90)
    (listing,) = listings
    return row, listing


@pytest.fixture(scope="module")
def compiler():
    """Compiles calls in a process of its own: this one may interpret kernels."""
    with (
        pytest.MonkeyPatch.context() as environment,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        environment.delenv("TRITON_INTERPRET", raising=False)
        yield lambda *args: pool.submit(compile_call, *args).result()


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("K", [64, 128])
def test_what_the_compiler_makes_of_it(compiler, K, window):
    row, listing = compiler(K, torch.bfloat16, window)
    assert row.opcodes["HGMMA"] > 0
    assert row.opcodes["HMMA"] == 0
    assert row.opcodes["UTMALDG"] > 0
    assert row.opcodes["USETMAXREG"] > 0
    assert row.spills <= 8
    assert row.shared_bytes <= 227 << 10
    assert row.programs_per_sm >= 1
    # Between the wait for the scores and that for the product all weights are formed: they overlap.
    waits = re.findall(r"DEPBAR\.LE gsb0, 0x1 ;(.*?)DEPBAR\.LE gsb0, (0x\d)", listing, re.DOTALL)
    assert len(waits) == 2 * (2 if window is None else 3)  # two warpgroups, loops of each
    for between, pending in waits:
        assert pending == "0x0"
        assert between.count("MUFU.EX2") >= 64


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="no GPU of compute capability 9.0 here",
)
LARGE_CASES = [
    *CASES,
    (2, 1000, 1000, 8, 2, None),
    (3, 333, 2500, 6, 3, None),
    (1, 2048, 2048, 4, 4, 700),
]


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize(("B", "T", "S", "H", "H_kv", "window"), LARGE_CASES)
def test_values_on_a_gpu(B, T, S, H, H_kv, window, K, dtype):
    q, k, v = inputs(B, T, S, H, H_kv, K, dtype, device="cuda")
    with guarded_allocations():
        found = hopper.attention_hopper(q, k, v, window)
        torch.cuda.synchronize()
    assert_right(found, q, k, v, window)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("window", [None, 300])
def test_a_gpu_repeats_itself(K, window):
    q, k, v = inputs(4, 1500, 1700, 8, 2, K, device="cuda")
    cache = torch.full((2, 4, 2000, 2, K), torch.nan, dtype=q.dtype, device="cuda")
    cache[0, :, :1700], cache[1, :, :1700] = k, v
    first = hopper.attention_hopper(q, k, v, window)
    assert_right(first, q, k, v, window)
    for _ in range(50):
        again = hopper.attention_hopper(q, *cache[:, :, :1700], window)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 128])
def test_gradients_on_a_gpu(K):
    """Of the operation: its backward pass starts from what this path leaves."""
    tensors = [x.requires_grad_() for x in inputs(2, 300, 350, 4, 2, K, device="cuda")]
    found = []
    for path in ("hopper", "tiles"):
        plan = AttentionPlan(path)
        y = attention(*tensors, window=200, plan=plan, backend="triton")
        found.append(torch.autograd.grad(y, tensors, y.detach().sin()))
    for got, expected in zip(*found, strict=True):
        assert relative_rms(got, expected.double()) < CAPS[got.dtype]
