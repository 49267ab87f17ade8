"""Attention's kernels for few queries, plans, and how kernels are launched."""

import pytest
import torch

from archs.ops import attention as op
from archs.ops.attention import AttentionPlan, attention
from attention_checks import ONE, TILES, check, inputs, ragged
from harness import traffic
from kernel_checks import DEVICE, interpreted, on_a_gpu, relative_rms

pytest.importorskip("triton")
from archs.ops import attention_kernel as kernels


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("window", [None, 50, 200])
@pytest.mark.parametrize("T", [1, 4])
def test_decode(T, window, splits):
    check(inputs(2, T, 300, 4, 2, 32), AttentionPlan("decode", splits), window=window)


@pytest.mark.parametrize("S", [1, 2, 63, 64, 65, 1000])
def test_decode_over_every_length(S):
    check(inputs(3, 1, S, 6, 2, 64), AttentionPlan("decode", 4), gradients=S < 1000)


@pytest.mark.parametrize("K", [8, 16, 80, 128, 256])
def test_decode_with_every_head_size(K):
    check(inputs(1, 2, 100, 2, 1, K), AttentionPlan("decode", 2), gradients=False)


@pytest.mark.parametrize(("T", "H"), [(64, 1), (1, 64), (16, 4), (7, 9)])
def test_decode_has_room_for_64_rows(T, H):
    check(inputs(1, T, 130, H, 1, 16), AttentionPlan("decode", 2), gradients=False)


@pytest.mark.parametrize("sign", [1, -1])
def test_decode_where_the_largest_logit_is_in_any_split(sign):
    """40 rows are put together a split at a time; later keys have larger logits, or smaller."""
    args = inputs(1, 8, 400, 5, 1, 16)
    args["q"][..., 0], args["k"][..., 0] = 4.0, sign * torch.arange(400)[:, None] / 40
    check(args, AttentionPlan("decode", 6))


@pytest.mark.parametrize("K", [64, 128])
def test_decode_in_float16(K):
    check(inputs(2, 1, 300, 8, 2, K, dtype=torch.float16), AttentionPlan("decode", 3))


def test_decode_equals_tiles():
    args = inputs(2, 7, 200, 4, 2, 32)
    expected = attention(**args, plan=TILES, backend="triton").double()
    for splits in (1, 2, 7):
        got = attention(**args, plan=AttentionPlan("decode", splits), backend="triton")
        assert relative_rms(got, expected) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends_have_no_plans(backend):
    with pytest.raises(ValueError, match="plan is for backend 'triton'"):
        attention(**inputs(1, 2, 2, 1, 1, 16), plan=TILES, backend=backend)


@pytest.mark.parametrize(
    ("T", "plan", "words"),
    [
        (
            2,
            AttentionPlan("decode", 0),
            "path of tiles, decode, hopper, and splits from 1 on in path 'decode' alone",
        ),
        (
            2,
            AttentionPlan("tiles", 2),
            "path of tiles, decode, hopper, and splits from 1 on in path 'decode' alone",
        ),
        (
            2,
            AttentionPlan("tile"),
            "path of tiles, decode, hopper, and splits from 1 on in path 'decode' alone",
        ),
        (
            2,
            AttentionPlan("hopper", 2),
            "path of tiles, decode, hopper, and splits from 1 on in path 'decode' alone",
        ),
        (33, AttentionPlan("decode"), "room for 64 queries .* got 66; use path 'tiles'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(T, plan, words):
    with pytest.raises(ValueError, match=words):
        attention(**inputs(1, T, 40, 2, 1, 16), plan=plan, backend="triton")


@pytest.mark.parametrize(
    ("shape", "keys", "window", "plan"),
    [
        ((8, 4096, 16, 128), (4096, 16), None, TILES),
        ((1, 2, 16, 128), (2, 16), None, TILES),  # a short sequence
        ((1, 65, 1, 128), (4096, 1), None, TILES),
        ((1, 9, 8, 128), (4096, 1), None, TILES),  # 72 rows
        ((1, 1, 16, 64), (1, 16), None, ONE),
        ((64, 1, 16, 128), (4096, 16), None, ONE),
        ((1, 8, 8, 128), (4096, 1), None, AttentionPlan("decode", 16)),  # of 256 keys
        ((4, 1, 32, 128), (32768, 8), None, AttentionPlan("decode", 12)),  # 384 programs
        ((1, 8, 8, 128), (131072, 1), None, AttentionPlan("decode", 32)),  # of 64 rows
        ((0, 1, 8, 128), (131072, 8), None, AttentionPlan("decode", 396)),
        ((1, 1, 1, 64), (4096, 1), 1023, AttentionPlan("decode", 3)),
        ((1, 2, 1, 64), (4096, 1), 1023, AttentionPlan("decode", 4)),
        ((1, 8, 1, 64), (1023, 1), 1020, AttentionPlan("decode", 3)),
        ((1, 8, 16, 128), (4096, 16), None, AttentionPlan("decode", 16)),
        ((4, 1, 32, 128), (32768, 8), 1024, AttentionPlan("decode", 4)),
    ],
)
def test_the_plan_fills_the_gpu(shape, keys, window, plan):
    assert op.plan(shape, keys, "cpu", window) == plan


def test_the_hopper_path_is_asked_for_and_says_where_it_cannot_run():
    plan, args = AttentionPlan("hopper"), inputs(1, 4, 4, 1, 1, 64, dtype=torch.float16)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"Hopper: .* interpreter does not run Gluon"):
            attention(**args, plan=plan, backend="triton")
    with pytest.raises(ValueError, match="'hopper' takes no lengths; use path 'tiles'"):
        attention(**args, lengths=ragged(4), plan=plan, backend="triton")


def test_the_plan_is_followed(monkeypatch):
    args = inputs(1, 3, 90, 2, 1, 16)
    seen = []
    monkeypatch.setattr(op, "plan", lambda *given: seen.append(given) or AttentionPlan("decode", 2))
    _, counts = traffic.count(lambda: attention(**args, window=80, backend="triton"))
    assert set(counts.kernels) == {"attention_decode_kernel"}
    assert counts.kernels["attention_decode_kernel"].programs == 2
    assert (counts.launches, set(counts.operations)) == (1, {"zeros"})
    assert seen == [((1, 3, 2, 16), (90, 1), args["q"].device, 80)]
    _, counts = traffic.count(lambda: attention(**args, plan=TILES, backend="triton"))
    assert set(counts.kernels) == {"attention_forward_kernel"}
    assert len(seen) == 1


@on_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("splits", [1, 3, 40])
def test_decode_on_a_gpu(splits, dtype):
    plan = AttentionPlan("decode", splits)
    for K in (16, 48, 64, 128, 256):
        check(inputs(3, 2, 1000, 8, 2, K, dtype=dtype), plan, lengths=ragged(1000, 333, 1))
    args = inputs(32, 1, 5000, 8, 8, 128, dtype=dtype)
    expected = attention(**args, plan=plan, backend="triton")
    for _ in range(200):  # whichever split finishes last
        assert torch.equal(attention(**args, plan=plan, backend="triton"), expected)


@pytest.mark.parametrize(
    ("window", "splits", "shares"),
    [
        (None, 3, [256, 256, 88]),
        (None, 4, [192, 192, 192, 24]),
        (None, 2, [320, 280]),
        (100, 2, [64, 36]),
    ],
)
def test_splits_share_the_keys_that_are_read(monkeypatch, window, splits, shares):
    """Where logits are 0 and values 1, the sums of each split count its keys."""
    seen, kernel = [], kernels.attention_decode_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(*given, **constants):
                seen.append((*given[6:8], constants["BM"]))
                return kernel[grid](*given, **constants)

            return launch

    monkeypatch.setattr(kernels, "attention_decode_kernel", Spy())
    args = inputs(2, 1, 600, 4, 2, 64)
    args["k"][:], args["v"][:] = 0.0, 1.0
    attention(**args, window=window, plan=AttentionPlan("decode", splits), backend="triton")
    ((parts, weights, rows),) = seen
    expected = torch.tensor(shares, dtype=torch.float32, device=DEVICE)
    assert rows == 16  # the least of a product's operand
    assert (weights[:, :, 0] == 0).all()
    assert (weights[:, :, 1] == expected).all()
    assert (parts == expected[:, None]).all()


@interpreted
@pytest.mark.parametrize("step", [5, 11])
def test_whichever_program_comes_first(monkeypatch, step):
    """The interpreter runs one after the other; here in other orders."""
    from triton.runtime.interpreter import InterpreterBuilder

    args, plan = inputs(2, 1, 300, 4, 2, 32), AttentionPlan("decode", 3)  # 12 programs
    expected = attention(**args, plan=plan, backend="triton")
    place = InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(
        InterpreterBuilder,
        "set_grid_idx",
        lambda self, x, y, z: place(self, x * step % self.grid_dim[0], y, z),
    )
    assert torch.equal(attention(**args, plan=plan, backend="triton"), expected)


@interpreted
@pytest.mark.parametrize("window", [None, 100, 300])
@pytest.mark.parametrize("splits", [1, 3])
def test_only_keys_that_are_read_are_loaded(splits, window):
    T, S, H, K = 2, 600, 2, 64
    args, plan = inputs(1, T, S, H, H, K, dtype=torch.float16), AttentionPlan("decode", splits)
    _, counts = traffic.count(lambda: attention(**args, window=window, plan=plan, backend="triton"))
    read, row = S if window is None else T + window - 1, 2 * K * H
    expected = splits * row * T + row * T + 4 * H * T + 2 * row * read
    if splits > 1:  # parts, written and read once, and the counter of those done
        expected += splits * H * (2 * T * (4 * K + 8) + 4)
    assert counts.kernels["attention_decode_kernel"].requested_bytes == expected


def test_decode_has_no_room_for_65_rows():
    with pytest.raises(ValueError, match="got 65; use path 'tiles'"):
        attention(**inputs(1, 65, 80, 1, 1, 16), plan=ONE, backend="triton")


def test_rows_are_of_one_key_head():
    check(inputs(1, 9, 20, 8, 4, 16), ONE, gradients=False)  # 18 rows, though T H = 72


@pytest.mark.parametrize("window", [89, 90, 91])
def test_a_window_of_all_keys_is_none(monkeypatch, window):
    seen = []
    monkeypatch.setattr(op, "plan", lambda *given: seen.append(given[3]) or TILES)
    attention(**inputs(1, 3, 90, 2, 1, 16), window=window, backend="triton")
    assert seen == [89 if window == 89 else None]


@pytest.fixture
def matmul():
    """PyTorch's newer setting, which the older function refuses to read."""
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("dtype", "setting", "products"),
    [
        (torch.float32, "ieee", "tf32x3"),
        (torch.float32, "tf32", "tf32"),
        (torch.float16, "ieee", "tf32"),
    ],
)
def test_float32_is_as_exact_as_pytorchs_own(dtype, setting, products, matmul):
    matmul.fp32_precision = setting
    q, k, _ = inputs(1, 2, 2, 1, 1, 16, dtype=dtype).values()
    for kernel in kernels.TILES:
        assert kernels._launch(kernel, q, k, None)[1]["PRECISION"] == products
    attention(q, k, k, backend="triton")


@pytest.mark.parametrize(("arch", "main"), [(89, False), (90, True), (100, True), (120, False)])
def test_tiles_of_other_gpus(monkeypatch, arch, main):
    monkeypatch.setattr(kernels, "_arch", lambda: arch)
    q, k, _ = inputs(1, 4, 4, 1, 1, 128, dtype=torch.float16).values()
    expected = kernels.TILES["forward"][2][128]
    if not main:
        expected = kernels.TILES_OF_OTHERS["forward", 2, 128]
    assert kernels._launch("forward", q, k, None)[2] == expected


@pytest.mark.parametrize("K", [1, 2, 8])
def test_products_have_operands_that_tensor_cores_take(K):
    q, k, _ = inputs(1, 1, 4, 1, 1, K).values()
    assert kernels._launch("forward", q, k, None)[1]["BK"] == 16
