"""SSD's Triton kernels against the fold in float64, in the interpreter where there is no GPU."""

import mmap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from archs.ops import BackendUnavailableError
from archs.ops import ssd as op
from archs.ops.ssd import Plan, ssd, ssd_step, ssd_step_triton
from harness import traffic
from kernel_checks import (
    DEVICE,
    LENGTHS,
    assert_as_exact,
    assert_same,
    guarded_allocations,
    in_margins,
    interpreted,
    on_a_gpu,
    randn,
    relative_rms,
)

pytest.importorskip("triton")
from archs.ops import ssd_kernel as kernels

OUTPUTS = ("y", "end")
STEP = ("x", "log_decay", "b", "c", "state", "dt", "skip")
MAP_NORESERVE = 0x4000  # Linux; the mmap module has no name for it
SPLIT = Plan(3)


def inputs(B, T, H, P, N, G=1, dtype=torch.float32, every=True, seed=0):
    """Decays from almost none to strong, by head; without state, dt and skip unless `every`."""
    dt = F.softplus(randn(B, T, H, seed=seed) - 2)
    rate = torch.linspace(0.1, 8, H, device=DEVICE)
    found = {
        "x": randn(B, T, H, P, dtype=dtype, seed=seed),
        "log_decay": -rate * dt,
        "b": randn(B, T, G, N, dtype=dtype, seed=seed + 1),
        "c": randn(B, T, G, N, dtype=dtype, seed=seed + 2),
    }
    if every:
        found |= {"state": randn(B, H, P, N, seed=seed), "dt": dt, "skip": randn(H, seed=seed)}
    return found


def results(args, backend, plan=None, seed_type=None, gradients=True):
    """y, the state after and, from random gradients of these, every gradient, by name."""
    leaves = {k: x.detach().requires_grad_() for k, x in args.items()}
    y, end = ssd(**leaves, plan=plan, backend=backend)
    outputs = {k: out for k, out in (("y", y), ("end", end)) if out is not None}
    named = {k: out.detach() for k, out in outputs.items()}
    if gradients:
        seeds = [
            randn(*o.shape, dtype=seed_type or y.dtype, seed=1).to(o.dtype)
            for o in outputs.values()
        ]
        found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), seeds)
        named |= dict(zip((f"d{k}" for k in leaves), found, strict=True))
    return named


def exact_results(args, gradients=True):
    wide = {k: x.double() for k, x in args.items()}
    return results(wide, "reference", seed_type=args["x"].dtype, gradients=gradients)


def check(args, plan=None, gradients=True):
    """Against plain PyTorch in float32 on the same inputs, its results rounded to x's type."""
    got = results(args, "triton", plan, gradients=gradients)
    plain = results(args, "torch", gradients=gradients)
    plain = {k: out.to(args["x"].dtype).to(out.dtype) for k, out in plain.items()}
    exact = exact_results(args, gradients)
    assert got.keys() == exact.keys()
    for name in exact:
        factor = 2 if name in OUTPUTS else 3
        values = got[name], plain[name], exact[name]
        assert_as_exact(*values, factor, name, args["x"].dtype)


@pytest.fixture
def chunks_of_64(monkeypatch):
    """float32 in the chunks of the two-byte types: the main path, without their rounding."""
    monkeypatch.setitem(kernels.CHUNK, 4, 64)


@pytest.fixture
def chunks_of_16(monkeypatch):
    """So many chunks, and segments, in so few tokens."""
    monkeypatch.setitem(kernels.CHUNK, 4, 16)
    monkeypatch.setitem(kernels.CHUNK, 2, 16)


def segments_of(T, plan, bytes_each=4):
    """How many segments there really are: they are rounded up to whole stretches of chunks."""
    return kernels._segments(T, plan.segments, kernels.CHUNK[bytes_each])[0]


@pytest.mark.parametrize("T", LENGTHS)
def test_every_length(T, chunks_of_64):
    check(inputs(1, T, 2, 16, 16, every=T % 2 == 1))


@pytest.mark.parametrize("T", [1, 65, 200])
@pytest.mark.parametrize("every", [True, False])
def test_float32_in_its_own_chunks(T, every):
    check(inputs(2, T, 2, 16, 32, every=every))


@pytest.mark.parametrize("P", [16, 32, 64, 128])
@pytest.mark.parametrize("N", [16, 32, 64, 128])
def test_every_size(P, N):
    check(inputs(1, 70, 2, P, N, G=2 if P == N else 1))


@pytest.mark.parametrize(("H", "G"), [(6, 1), (6, 2), (6, 6), (10, 1)])
def test_groups_and_more_heads_than_a_block(H, G):
    assert kernels.BLOCK_H < 10
    check(inputs(1, 40, H, 16, 16, G))


@pytest.mark.parametrize("missing", ["state", "dt", "skip"])
def test_each_option_alone(missing):
    args = inputs(2, 35, 2, 16, 16)
    del args[missing]
    check(args)


@pytest.mark.parametrize("T", [1, 63, 130])
def test_float16(T):
    check(inputs(1, T, 2, 32, 16, dtype=torch.float16))


@pytest.mark.parametrize(("T", "segments"), [(64, 2), (97, 2), (100, 3), (180, 4)])
@pytest.mark.parametrize("every", [True, False])
def test_segments(T, segments, every, chunks_of_16):
    assert segments_of(T, Plan(segments)) == segments
    check(inputs(1, T, 2, 16, 16, every=every), Plan(segments))


@pytest.mark.parametrize(("T", "segments"), [(100, 3), (97, 2)])
@pytest.mark.parametrize(("H", "P", "G"), [(2, 128, 2), (4, 16, 2)])
def test_segments_of_rows_groups_and_halves_of_heads(T, segments, H, P, G, chunks_of_16):
    assert segments_of(T, Plan(segments)) == segments
    check(inputs(2, T, H, P, 16, G), Plan(segments))


def test_no_segment_is_empty():
    assert segments_of(200, Plan(5)) == 3  # of 96, 96 and 8 tokens
    check(inputs(1, 200, 1, 16, 16), Plan(5))


@given(
    rows=st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 2, 2)]),
    T=st.integers(1, 70),  # segments are of 48 tokens
    P=st.sampled_from([16, 32]),
    N=st.sampled_from([16, 32]),
    segments=st.integers(1, 2),
    options=st.sets(st.sampled_from(["state", "dt", "skip"])),
    gradients=st.sampled_from([True, False, False]),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_shape(rows, T, P, N, segments, options, gradients):
    B, H, G = rows
    args = inputs(B, T, H, P, N, G)
    for name in {"state", "dt", "skip"} - options:
        del args[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels.CHUNK, 4, 16)
        check(args, Plan(segments), gradients)


@pytest.mark.parametrize("plan", [Plan(1), Plan(3)])
def test_chunks_do_not_show(plan, monkeypatch):
    args = inputs(1, 150, 1, 16, 16)
    expected = exact_results(args)
    for chunk in (16, 32, 64, 128):
        monkeypatch.setitem(kernels.CHUNK, 4, chunk)
        for name, got in results(args, "triton", plan).items():
            assert relative_rms(got, expected[name]) < 1e-6, (chunk, name)


def strided(args):
    """The same values in other strides: slices of wider rows, heads first, every other one."""
    x, b, c = args["x"], args["b"], args["c"]
    B, T, H, P = x.shape
    G, N = b.shape[2:]
    mixed = torch.cat([t.reshape(B, T, -1) for t in (b, x, c)], dim=2)
    b, x, c = mixed.split([G * N, H * P, G * N], dim=2)
    return {
        "x": x.view(B, T, H, P),
        "log_decay": args["log_decay"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "b": b.view(B, T, G, N),
        "c": c.view(B, T, G, N),
        "state": args["state"].transpose(2, 3).contiguous().transpose(2, 3),
        "dt": args["dt"].repeat_interleave(2, dim=1)[:, ::2],
        "skip": args["skip"],
    }


def test_non_contiguous_inputs():
    args = inputs(2, 37, 4, 16, 32, 2)
    others = strided(args)
    assert not any(others[k].is_contiguous() for k in ("x", "log_decay", "b", "c", "state", "dt"))
    expected = results(args, "triton")
    assert_same(results(others, "triton"), expected)
    for dim in (2, 3):  # heads first; and a head's numbers apart, which kernels do not read so
        turned = {k: x.transpose(1, dim) for k, x in args.items() if k in ("x", "b", "c")}
        others |= {k: x.contiguous().transpose(1, dim) for k, x in turned.items()}
        assert_same(results(others, "triton"), expected)


def test_gradients_of_a_sum():
    args = {k: x.requires_grad_() for k, x in inputs(1, 40, 2, 16, 16).items()}
    y, _ = ssd(**args, backend="triton")
    (expected,) = torch.autograd.grad(y, args["x"], torch.ones_like(y), retain_graph=True)
    (got,) = torch.autograd.grad(y.sum(), args["x"])  # an expanded scalar
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", STEP)
def test_the_gradient_of_one_argument(name):
    args = inputs(1, 40, 2, 16, 16)
    expected = results(args, "triton")[f"d{name}"]
    args[name].requires_grad_()
    outputs = ssd(**args, backend="triton")
    seeds = [randn(*out.shape, seed=1) for out in outputs]
    (got,) = torch.autograd.grad(outputs, args[name], seeds)
    assert torch.equal(got, expected)


def test_states_are_kept_for_gradients_only(monkeypatch):
    args = inputs(1, 40, 2, 16, 16)
    seen, real = [], kernels.ssd_op
    monkeypatch.setattr(kernels, "ssd_op", lambda *given: seen.append(given[-1]) or real(*given))
    ssd(**args, backend="triton")
    args["b"].requires_grad_()
    ssd(**args, backend="triton")
    with torch.no_grad():
        ssd(**args, backend="triton")
    assert seen == [False, True, False]


def test_b_and_c_are_taken_in_the_type_of_x():
    args = inputs(1, 40, 2, 16, 16, dtype=torch.float16)
    expected = ssd(**args, backend="triton")
    wide = {k: x.float() if k in ("b", "c") else x for k, x in args.items()}
    for got, same in zip(ssd(**wide, backend="triton"), expected, strict=True):
        assert torch.equal(got, same)


@interpreted
@pytest.mark.parametrize("dim", [1, 2])
def test_offsets_beyond_32_bits(dim):
    """Tokens, or heads, so far apart that the last lies past 2^31 elements."""
    args = inputs(1, 70, 4, 16, 16)
    expected, _ = ssd(**args, backend="triton")
    stride = 2**25 if dim == 1 else 2**30
    strides = (1, stride, 16, 1) if dim == 1 else (1, 16, stride, 1)
    elements = 1 + (args["x"].shape[dim] - 1) * stride + 70 * 64
    # Memory that is there once it is written, and only then.
    memory = mmap.mmap(-1, 4 * elements, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)
    x = torch.frombuffer(memory, dtype=torch.float32).as_strided(args["x"].shape, strides)
    args["x"] = x.copy_(args["x"])
    y, _ = ssd(**args, backend="triton")
    assert torch.equal(y, expected)


def test_gradients_of_the_state_alone():
    args = inputs(2, 70, 2, 16, 16)
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = {k: x.to(dtype).requires_grad_() for k, x in args.items() if k != "skip"}
        _, end = ssd(**leaves, backend=backend)
        seed = randn(*end.shape, seed=1).to(dtype)
        found.append(torch.autograd.grad(end, list(leaves.values()), seed, allow_unused=True))
    for name, got, exact in zip(leaves, *found, strict=True):
        if exact is None:  # of c
            assert not got.any()
        else:
            assert relative_rms(got, exact) < 1e-6, name


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_beside_tensors_is_neither_read_nor_written(segments, dtype, chunks_of_16):
    plan = Plan(segments)
    T = 100  # of which the second segment has 4, in the first of its three chunks
    assert segments_of(T, plan) == segments
    args = inputs(1, T, 2, 128, 16, dtype=dtype)
    found = []
    for some in (args, strided(args)):
        with guarded_allocations():
            found.append(results({k: in_margins(x) for k, x in some.items()}, "triton", plan))
    expected = results(args, "triton", plan)
    for got in found:
        assert_same(got, expected)


@interpreted
@pytest.mark.parametrize("plan", [Plan(1), SPLIT])
@pytest.mark.parametrize("T", [1, 70, 130])
def test_every_access_is_inside_the_arguments(plan, T):
    """Reads too, also those whose values go nowhere: counting any other raises."""
    args = inputs(1, T, 3, 16, 32)
    _, counts = traffic.count(lambda: results(args, "triton", plan))
    names = {f"ssd_{name}_kernel" for name in ("forward", "backward", "gradients")}
    assert names <= set(counts.kernels)
    assert ("ssd_fold_kernel" in counts.kernels) == (plan == SPLIT and T == 130)
    _, counts = traffic.count(lambda: ssd_step_triton(**token(args)))
    assert set(counts.kernels) == {"ssd_step_kernel"}


@pytest.mark.parametrize(
    "what",
    ["equal tokens", "huge dt", "some huge dt", "no decay", "growth", "large inputs", "zeros"],
)
@pytest.mark.parametrize("plan", [Plan(1), SPLIT])
def test_adversarial_inputs(what, plan, chunks_of_64):
    args = inputs(1, 200, 2, 16, 16)
    if what == "equal tokens":
        args["x"][:], args["b"][:], args["c"][:] = args["x"][:, :1], args["b"][:, :1], 1.0
        args["dt"][:] = args["dt"][:, :1]
        args["log_decay"][:] = args["log_decay"][:, :1]
    elif what == "huge dt":
        args["dt"] *= 1e3
        args["log_decay"] *= 1e3
    elif what == "some huge dt":  # after which small ones must count in full
        huge = (torch.arange(200, device=DEVICE) % 3 == 0)[None, :, None]
        args["log_decay"] = torch.where(huge, -1e6 * args["dt"], args["log_decay"] / 100)
    elif what == "no decay":
        args["log_decay"] = torch.zeros_like(args["log_decay"])
    elif what == "growth":
        args["log_decay"] = args["log_decay"].abs() / 50
    elif what == "large inputs":
        for name in ("x", "b", "c"):
            args[name] *= 1e4
    else:
        args = {k: torch.zeros_like(x) for k, x in args.items()}
    check(args, plan)


def test_every_split_hands_the_state_over():
    T = 67
    args = inputs(1, T, 1, 16, 16)
    state, skip = args.pop("state"), args.pop("skip")
    expected, end = ssd(**args, state=state, skip=skip, backend="triton")
    for split in range(1, T):
        head = {k: x[:, :split] for k, x in args.items()}
        tail = {k: x[:, split:] for k, x in args.items()}
        first, middle = ssd(**head, state=state, skip=skip, backend="triton")
        second, last = ssd(**tail, state=middle, skip=skip, backend="triton")
        assert relative_rms(torch.cat([first, second], 1), expected.double()) < 1e-6
        assert relative_rms(last, end.double()) < 1e-6


@pytest.mark.parametrize("split", [1, 31, 64])
def test_gradients_pass_through_a_state_handed_over(split):
    args = inputs(1, 70, 2, 16, 16)
    exact = exact_results(args)
    leaves = {k: x.clone().requires_grad_() for k, x in args.items()}
    tokens = {k: x for k, x in leaves.items() if k not in ("state", "skip")}
    options = {"skip": leaves["skip"], "backend": "triton"}
    head = {k: x[:, :split] for k, x in tokens.items()}
    tail = {k: x[:, split:] for k, x in tokens.items()}
    first, middle = ssd(**head, state=leaves["state"], **options)
    second, end = ssd(**tail, state=middle, **options)
    outputs = torch.cat([first, second], 1), end
    seeds = [randn(*out.shape, seed=1) for out in outputs]
    got = torch.autograd.grad(outputs, list(leaves.values()), seeds)
    for name, gradient in zip(leaves, got, strict=True):
        assert relative_rms(gradient, exact[f"d{name}"]) < 1e-6, name


def test_batch_rows_do_not_touch():
    args = inputs(3, 40, 1, 16, 16)
    order = [2, 0, 1]
    shuffled = {k: x if k == "skip" else x[order] for k, x in args.items()}
    expected, got = results(args, "triton"), results(shuffled, "triton")
    for name in ("y", "end"):
        assert torch.equal(got[name], expected[name][order])
    alone = {k: x if k == "skip" else x[1:2] for k, x in args.items()}
    assert torch.equal(results(alone, "triton")["y"], expected["y"][1:2])


@pytest.mark.parametrize("plan", [Plan(1), SPLIT])
@pytest.mark.parametrize("changed", [1, 40, 64, 80])
def test_the_future_changes_nothing(changed, plan):
    args = inputs(1, 130, 1, 16, 16)
    y, _ = ssd(**args, plan=plan, backend="triton")
    for name in ("x", "b", "c", "dt", "log_decay"):
        args[name][:, changed:] *= 3
    z, _ = ssd(**args, plan=plan, backend="triton")
    assert torch.equal(z[:, :changed], y[:, :changed])
    assert (z[:, changed:] != y[:, changed:]).all()


def test_repeats_give_the_same_bits():
    args = inputs(1, 130, 1, 16, 16)
    assert segments_of(130, SPLIT) > 1
    expected = results(args, "triton", SPLIT)
    for _ in range(10):
        assert_same(results(args, "triton", SPLIT), expected)


def test_what_is_passed_in_stays():
    args = inputs(1, 40, 2, 16, 16)
    before = {k: x.clone() for k, x in args.items()}
    results(args, "triton")
    ssd_step_triton(**token(args))
    assert_same(args, before)


def token(args):
    """The arguments of a step: the last token's."""
    return {k: x if k in ("state", "skip") else x[:, -1] for k, x in args.items()}


@pytest.mark.parametrize("missing", [None, "dt", "skip"])
@pytest.mark.parametrize("P", [16, 64])
def test_a_step_is_the_definition(missing, P):
    args = token(inputs(3, 2, 4, P, 32, 2))
    args.pop(missing, None)

    def stepped(step, dtype):
        leaves = {k: x.detach().to(dtype).requires_grad_() for k, x in args.items()}
        outputs = step(**leaves)
        seeds = [randn(*out.shape, seed=1).to(dtype) for out in outputs]
        return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), seeds)]

    got = stepped(ssd_step_triton, torch.float32)
    plain = stepped(ssd_step, torch.float32)
    exact = stepped(ssd_step, torch.float64)
    names = ("y", "end", *args)
    for index, values in enumerate(zip(got, plain, exact, strict=True)):
        assert_as_exact(*values, 2 if index < 2 else 3, names[index])


def test_a_step_of_non_contiguous_inputs():
    args = inputs(2, 3, 4, 16, 32, 2)
    expected = ssd_step_triton(**token(args))
    turned = {
        k: x if k == "skip" else x.transpose(1, -1).contiguous().transpose(1, -1)
        for k, x in token(args).items()
    }
    wider = {**token(args), "x": torch.cat([args["x"]] * 2, dim=-1)[:, -1, :, :16]}
    for others in (token(strided(args)), turned, wider):
        for got, same in zip(ssd_step_triton(**others), expected, strict=True):
            assert torch.equal(got, same)


def test_steps_equal_the_sequence():
    args = inputs(2, 6, 2, 16, 16)
    y, end = ssd(**args, backend="triton")
    state = args.pop("state")
    for t in range(6):
        at = {k: x if k == "skip" else x[:, t] for k, x in args.items()}
        y_t, state = ssd_step_triton(**at, state=state)
        assert relative_rms(y_t, y[:, t].double()) < 1e-6
    assert relative_rms(state, end.double()) < 1e-6


@interpreted
def test_bfloat16_is_refused_in_the_interpreter():
    with pytest.raises(BackendUnavailableError, match="interpreter computes bfloat16 wrongly"):
        ssd(**inputs(1, 2, 1, 16, 16, dtype=torch.bfloat16), backend="triton")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "has no kernels in float64; use 'torch'"),
        ({"P": 24}, "P = 24, N = 16; use 'torch'"),
        ({"N": 8}, "P = 16, N = 8; use 'torch'"),
    ],
)
def test_what_the_kernels_do_not_have_is_refused(changes, words):
    args = inputs(**{"B": 1, "T": 2, "H": 1, "P": 16, "N": 16, **changes})
    with pytest.raises(BackendUnavailableError, match=words):
        ssd(**args, backend="triton")
    with pytest.raises(BackendUnavailableError, match=words):
        ssd_step_triton(**token(args))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends_have_no_plans(backend):
    with pytest.raises(ValueError, match="plan is for backend 'triton'"):
        ssd(**inputs(1, 2, 1, 16, 16), plan=Plan(1), backend=backend)


@pytest.mark.parametrize("segments", [0, -1])
def test_a_plan_without_segments_is_refused(segments):
    with pytest.raises(ValueError, match=f"one segment at least, got {segments}"):
        ssd(**inputs(1, 2, 1, 16, 16), plan=Plan(segments), backend="triton")


@pytest.mark.parametrize(
    ("shape", "segments"),
    [
        ((8, 4096, 64, 64), 1),
        ((16, 2048, 64, 64), 1),
        ((1, 32768, 132, 64), 1),
        ((1, 32768, 64, 64), 9),
        ((1, 32768, 80, 128), 1),  # two programs a head
        ((1, 8192, 8, 64), 8),  # of 1,024 tokens
        ((1, 1000, 1, 64), 1),
    ],
)
def test_the_plan_fills_the_gpu(shape, segments):
    assert op.plan(shape, "cpu") == Plan(segments)


def test_the_plan_is_followed(monkeypatch):
    args = inputs(1, 600, 1, 16, 16, every=False)
    seen = []
    monkeypatch.setattr(op, "plan", lambda shape, device: seen.append((shape, device)) or Plan(2))
    _, counts = traffic.count(lambda: ssd(**args, backend="triton"))
    assert (counts.launches, counts.operation_calls) == (2, 0)
    assert seen == [((1, 600, 1, 16), args["x"].device)]
    _, counts = traffic.count(lambda: ssd(**args, plan=Plan(1), backend="triton"))
    assert counts.launches == 1
    assert len(seen) == 1


@pytest.mark.parametrize("every", [True, False])
def test_operations_keep_pytorchs_rules(every):
    args = inputs(1, 40, 2, 16, 16, every=every)
    x, log_decay, b, c = (args[k].requires_grad_() for k in ("x", "log_decay", "b", "c"))
    state, dt, skip = (args[k].requires_grad_() if every else None for k in ("state", "dt", "skip"))
    ops = torch.ops.seqscale
    torch.library.opcheck(
        ops.ssd.default, (x, log_decay, b, c, state, dt, skip, 1 + every, every, True)
    )
    tensors = [None if t is None else t.detach() for t in (x, log_decay, b, c, dt, skip)]
    dend = randn(1, 2, 16, 16) if every else None
    kept = torch.zeros(1, 1, 2, 16, 16)
    torch.library.opcheck(
        ops.ssd_backward.default, (randn(1, 40, 2, 16), dend, *tensors, kept, 1, every)
    )
    if every:
        torch.library.opcheck(ops.ssd_step.default, tuple(token(args)[k] for k in STEP))


def test_torch_compile_needs_no_graph_break():
    args = inputs(1, 40, 2, 16, 16)

    def function(x, log_decay, b, c, state, dt, skip):
        y, end = ssd(2 * x, log_decay, b, c, state, dt=dt, skip=skip, backend="triton")
        return 3 * y, end

    def gradients(function):
        leaves = [args[k].clone().requires_grad_() for k in STEP]
        outputs = function(*leaves)
        seeds = [randn(*out.shape, seed=1) for out in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, seeds)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradients(compiled), gradients(function), strict=True):
        assert torch.equal(got, expected)


def test_flops_are_those_of_the_recurrence():
    B, T, H, P, N = 1, 40, 2, 16, 32
    args = {k: x.requires_grad_() for k, x in inputs(B, T, H, P, N).items()}
    with FlopCounterMode(display=False) as counter:
        y, _ = ssd(**args, backend="triton")
        assert counter.get_total_flops() == 5 * B * T * H * P * N
        y.sum().backward()
        assert counter.get_total_flops() == 3 * 5 * B * T * H * P * N
    with FlopCounterMode(display=False) as counter:
        ssd_step_triton(**token(args))
    assert counter.get_total_flops() == 5 * B * H * P * N


@on_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("T", [1, 65, 1025])
@pytest.mark.parametrize("plan", [Plan(1), Plan(4)])
def test_on_a_gpu(T, dtype, plan):
    for sizes in ((64, 128), (64, 64), (128, 128), (16, 16)):
        args = inputs(2, T, 8, *sizes, dtype=dtype)
        check(args, plan)
    expected = results(args, "triton", plan)
    for _ in range(50):
        assert_same(results(args, "triton", plan), expected)


@on_a_gpu
@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    T, H, P, N = 2**19 + 130, 64, 64, 16
    x = torch.randn(1, T, H, P, device=DEVICE, dtype=torch.bfloat16)
    b, c = (torch.randn(1, T, 1, N, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    log_decay = torch.full((1, T, H), -1.0, device=DEVICE)
    y, _ = ssd(x, log_decay, b, c, backend="triton")
    last = slice(T - 200, T)
    expected, _ = ssd(x[:, last], log_decay[:, last], b[:, last], c[:, last], backend="torch")
    assert relative_rms(y[:, -100:], expected[:, -100:].double()) < 8e-3
