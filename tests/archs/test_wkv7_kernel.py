"""WKV-7's Triton kernels against the fold in float64, in the interpreter where there is no GPU."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from archs.ops import BackendUnavailableError
from archs.ops import wkv7 as op
from archs.ops.plan import Plan
from archs.ops.wkv7 import log_decay_of, wkv7, wkv7_step, wkv7_step_triton
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
import triton
import triton.language as tl

from archs.ops import wkv7_kernel as kernels
from archs.ops.wkv7_forward_kernel import first_token

OUTPUTS = ("y", "end")
TOKENS = ("r", "decay", "k", "v", "a", "b")


def inputs(B, T, H, N, dtype=torch.float32, state=True, logits=True, seed=0, **kinds):
    """A state, and decay logits or log-decays; `kinds` are those of `removal`."""
    found = {
        "r": randn(B, T, H, N, dtype=dtype, seed=seed),
        "decay": 2 * randn(B, T, H, N, seed=seed + 1),
        "k": randn(B, T, H, N, dtype=dtype, seed=seed + 2),
        "v": randn(B, T, H, N, dtype=dtype, seed=seed + 3),
    }
    if not logits:
        found["decay"] = log_decay_of(found["decay"])
    found["a"], found["b"] = removal(B, T, H, N, seed=seed, **kinds)
    found |= {k: found[k].to(dtype) for k in "ab"}
    return found | ({"state": randn(B, H, N, N, seed=seed)} if state else {})


def removal(B, T, H, N, correlation=0.0, rate="random", seed=0):
    """a and b: keys of norm 1, any two correlated so far, and in-context rates."""
    shared, own = randn(B, 1, H, N, seed=seed + 4), randn(B, T, H, N, seed=seed + 5)
    kappa = F.normalize(correlation**0.5 * shared + (1 - correlation) ** 0.5 * own, dim=-1)
    rates = {
        "zero": torch.zeros_like(own),
        "random": torch.sigmoid(randn(B, T, H, N, seed=seed + 6)),
        "one": torch.ones_like(own),
    }
    return -kappa, kappa * rates[rate]


def call(args, backend, plan=None, logits=True):
    args = dict(args)
    decay = args.pop("decay")
    log_decay, decay_logits = (None, decay) if logits else (decay, None)
    return wkv7(
        args.pop("r"), log_decay, **args, decay_logits=decay_logits, plan=plan, backend=backend
    )


def results(args, backend, plan=None, logits=True, seed_type=None, gradients=True):
    """y, the state after and, from random gradients of these, every gradient, by name."""
    leaves = {k: x.detach().requires_grad_() for k, x in args.items()}
    y, end = call(leaves, backend, plan, logits)
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


def exact_results(args, logits=True, gradients=True):
    wide = {k: x.double() for k, x in args.items()}
    return results(wide, "reference", None, logits, args["r"].dtype, gradients)


def check(args, plan=None, logits=True, gradients=True):
    """Against plain PyTorch in float32 on the same inputs, its results rounded to r's type."""
    got = results(args, "triton", plan, logits, gradients=gradients)
    plain = results(args, "torch", None, logits, gradients=gradients)
    plain = {k: out.to(args["r"].dtype).to(out.dtype) for k, out in plain.items()}
    exact = exact_results(args, logits, gradients)
    assert got.keys() == exact.keys()
    for name in exact:
        factor = 2 if name in OUTPUTS else 3
        terms = read_terms(args, exact["dr"], logits) if name == "ddecay" else None
        values = got[name], plain[name], exact[name]
        assert_as_exact(*values, factor, name, args["r"].dtype, terms)


def read_terms(args, dr, logits):
    """What a log-decay's gradient is the sum of, by r, less what was written by its token.

    The difference vanishes where only one token is read and written: without a state before it.
    """
    terms = args["r"].double() * dr
    if not logits:
        return terms
    decay = args["decay"].double().requires_grad_()
    (slope,) = torch.autograd.grad(log_decay_of(decay).sum(), decay)
    return terms * slope


def segments_of(T, plan):
    """How many segments there really are: they are rounded up to whole stretches of chunks."""
    return kernels._segments(T, plan.segments)[0]


@pytest.fixture
def short_stretches(monkeypatch):
    """States are kept every 32 tokens, and segments are of as many."""
    monkeypatch.setattr(kernels, "SPACED", 1)


@pytest.mark.parametrize("T", LENGTHS)
def test_every_length(T):
    check(inputs(1, T, 2, 32, state=T % 2 == 1))


@pytest.mark.parametrize("N", [16, 32, 64, 128])
@pytest.mark.parametrize("logits", [True, False])
def test_every_size(N, logits):
    check(inputs(2, 70, 2, N, logits=logits), logits=logits)


@pytest.mark.parametrize("T", [1, 63, 130])
def test_float16(T):
    check(inputs(1, T, 2, 64, dtype=torch.float16))


@pytest.mark.parametrize("correlation", [0.9, 0.98])
@pytest.mark.parametrize("rate", ["zero", "random", "one"])
@pytest.mark.parametrize("decay", ["none", "random", "bound"])
def test_correlated_keys(correlation, rate, decay):
    args = inputs(1, 150, 1, 64, correlation=correlation, rate=rate, logits=False)
    if decay == "none":
        args["decay"] = torch.zeros_like(args["decay"])
    elif decay == "bound":
        args["decay"] = torch.full_like(args["decay"], -op.DECAY_BOUND)
    check(args, logits=False)


@pytest.mark.parametrize(("T", "segments"), [(64, 2), (97, 2), (100, 4), (190, 3)])
@pytest.mark.parametrize("state", [True, False])
def test_segments(T, segments, state, short_stretches):
    assert segments_of(T, Plan(segments)) == segments
    check(inputs(2, T, 2, 32, state=state), Plan(segments))


def test_segments_of_correlated_keys():
    args = inputs(1, 300, 2, 64, correlation=0.98, rate="one")
    assert segments_of(300, Plan(3)) == 3
    check(args, Plan(3))


def test_no_segment_is_empty():
    assert segments_of(300, Plan(5)) == 3
    check(inputs(1, 300, 1, 32), Plan(5))


@given(
    rows=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
    T=st.integers(1, 70),
    N=st.sampled_from([16, 32]),
    segments=st.integers(1, 3),
    state=st.booleans(),
    logits=st.booleans(),
    gradients=st.sampled_from([True, False, False]),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_shape(rows, T, N, segments, state, logits, gradients):
    B, H = rows
    args = inputs(B, T, H, N, state=state, logits=logits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SPACED", 1)
        check(args, Plan(segments), logits, gradients)


@pytest.mark.parametrize("spaced", [1, 2, 8])
def test_where_states_are_kept_does_not_show(spaced, monkeypatch):
    args = inputs(1, 300, 1, 32)
    expected = results(args, "triton")
    monkeypatch.setattr(kernels, "SPACED", spaced)
    for name, got in results(args, "triton").items():
        assert relative_rms(got, expected[name].double()) < 1e-6, name


def strided(args):
    """The same values in other strides: slices of wider rows, heads first, every other one."""
    B, T, H, N = args["r"].shape
    mixed = torch.cat([args[k].reshape(B, T, -1) for k in "rka"], dim=2)
    r, k, a = (x.view(B, T, H, N) for x in mixed.split(H * N, dim=2))
    return {
        "r": r,
        "decay": args["decay"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": k,
        "v": args["v"].transpose(1, 3).contiguous().transpose(1, 3),
        "a": a,
        "b": args["b"].repeat_interleave(2, dim=1)[:, ::2],
        "state": args["state"].transpose(2, 3).contiguous().transpose(2, 3),
    }


def test_non_contiguous_inputs():
    args = inputs(2, 37, 3, 32)
    others = strided(args)
    assert not any(x.is_contiguous() for x in others.values())
    assert_same(results(others, "triton"), results(args, "triton"))


@pytest.mark.parametrize("name", [*TOKENS, "state"])
def test_the_gradient_of_one_argument(name):
    args = inputs(1, 40, 2, 32)
    expected = results(args, "triton")[f"d{name}"]
    args[name].requires_grad_()
    outputs = call(args, "triton")
    seeds = [randn(*out.shape, seed=1) for out in outputs]
    (got,) = torch.autograd.grad(outputs, args[name], seeds)
    assert torch.equal(got, expected)


def test_gradients_in_other_strides():
    args = {k: x.requires_grad_() for k, x in inputs(1, 40, 2, 32).items()}
    outputs = call(args, "triton")
    seeds = [randn(*out.shape, seed=1) for out in outputs]
    others = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in seeds]
    for leaf in args.values():
        expected, got = (
            torch.autograd.grad(outputs, leaf, given, retain_graph=True)[0]
            for given in (seeds, others)
        )
        assert torch.equal(got, expected)
    (expected,) = torch.autograd.grad(
        outputs[0], args["r"], torch.ones_like(outputs[0]), retain_graph=True
    )
    (got,) = torch.autograd.grad(outputs[0].sum(), args["r"])  # an expanded scalar
    assert torch.equal(got, expected)


def test_gradients_of_the_state_alone():
    args = inputs(2, 70, 2, 32)
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = {k: x.to(dtype).requires_grad_() for k, x in args.items()}
        _, end = call(leaves, backend)
        seed = randn(*end.shape, seed=1).to(dtype)
        found.append(torch.autograd.grad(end, list(leaves.values()), seed, allow_unused=True))
    for name, got, exact in zip(leaves, *found, strict=True):
        if exact is None:  # of r
            assert not got.any()
        else:
            assert relative_rms(got, exact) < 2e-6, name


def test_states_are_kept_for_gradients_only(monkeypatch):
    args = inputs(1, 40, 2, 32)
    seen, real = [], kernels.wkv7_op
    monkeypatch.setattr(kernels, "wkv7_op", lambda *given: seen.append(given[-1]) or real(*given))
    call(args, "triton")
    args["b"].requires_grad_()
    call(args, "triton")
    with torch.no_grad():
        call(args, "triton")
    assert seen == [False, True, False]


def test_all_is_taken_in_the_type_of_r():
    args = inputs(1, 40, 2, 32, dtype=torch.float16)
    expected = call(args, "triton")
    wide = {k: x.float() if k in "kvab" else x for k, x in args.items()}
    for got, same in zip(call(wide, "triton"), expected, strict=True):
        assert got.dtype == same.dtype
        assert torch.equal(got, same)


@triton.jit
def first_token_kernel(OUT, row, t, T, H, N: tl.constexpr):
    i_b = tl.program_id(0) + row
    tl.store(OUT, first_token(i_b, tl.program_id(0) + 3, t, T, H, N))


@pytest.mark.parametrize(("row", "t", "T"), [(0, 2**25, 2**25 + 1), (2**20, 5, 100)])
def test_offsets_beyond_32_bits(row, t, T):
    """Of tokens and rows; all kernels read and write from there on."""
    found = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    first_token_kernel[(1,)](found, row, t, T, 16, N=64)
    assert found.item() == ((row * T + t) * 16 + 3) * 64 > 2**31


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_beside_tensors_is_neither_read_nor_written(segments, dtype, short_stretches):
    plan = Plan(segments)
    args = inputs(2, 70, 2, 32, dtype=dtype)
    assert segments_of(70, plan) == segments
    expected = results(args, "triton", plan)
    for some in (args, strided(args)):
        with guarded_allocations():
            got = results({k: in_margins(x) for k, x in some.items()}, "triton", plan)
        assert_same(got, expected)


@interpreted
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("T", [1, 70, 300])
def test_every_access_is_inside_the_arguments(segments, T):
    """Reads too, also those whose values go nowhere: counting any other raises."""
    args = inputs(1, T, 3, 32)
    _, counts = traffic.count(lambda: results(args, "triton", Plan(segments)))
    names = {"wkv7_forward_kernel", "wkv7_backward_kernel"}
    if segments_of(T, Plan(segments)) > 1:
        names |= {"wkv7_fold_kernel", "wkv7_backward_fold_kernel"}
    assert set(counts.kernels) == names
    _, counts = traffic.count(lambda: wkv7_step_triton(*token(args)))
    assert set(counts.kernels) == {"wkv7_step_kernel"}


@interpreted
def test_no_two_programs_share_memory():
    """What the loops of a stretch leave each other, where programs run side by side: on a GPU."""
    B, T, H, N, chunks = 2, 200, 3, 16, 4
    _, counts = traffic.count(lambda: results(inputs(B, T, H, N), "triton", Plan(2)))
    programs, chunk = B * 2 * H, kernels.CHUNK
    found = counts.kernels["wkv7_backward_kernel"].arguments
    for name, floats in (
        ("STATES", chunks * N * N),
        ("DSTATES", chunks * N * N),
        ("SOLVES", chunks * chunk * chunk),
        ("US", chunks * chunk * N),
        ("DUS", chunks * chunk * N),
        ("AFTER", N * N),
    ):
        # The second segment has 72 tokens, in three of its four chunks.
        used = 1 if name == "AFTER" else (4 + 3) / (4 + 4)
        assert found[name].unique_bytes == 4 * programs * floats * used, name


@pytest.mark.parametrize(
    "what", ["equal tokens", "no decay", "full decay", "large logits", "large inputs", "zeros"]
)
@pytest.mark.parametrize("segments", [1, 2])
def test_adversarial_inputs(what, segments):
    args = inputs(1, 200, 2, 32)
    if what == "equal tokens":
        for name in TOKENS:
            args[name][:] = args[name][:, :1]
    elif what == "no decay":
        args["decay"][:] = -50.0
    elif what == "full decay":
        args["decay"][:] = 50.0
    elif what == "large logits":
        args["decay"] *= 80
    elif what == "large inputs":
        for name in "rkv":
            args[name] *= 1e4
    else:
        args = {k: torch.zeros_like(x) for k, x in args.items()}
    check(args, Plan(segments))


def test_a_log_decay_that_is_too_strong_is_not_a_number():
    args = inputs(1, 40, 1, 32, logits=False)
    args["decay"][:, 20, :, 3] = -1.01
    y, end = call(args, "triton", logits=False)
    assert y[:, 20:].isnan().all()
    assert end[:, :, 3].isnan().all()


def test_every_split_hands_the_state_over():
    T = 97
    args = inputs(1, T, 1, 32)
    state = args.pop("state")
    expected, end = call({**args, "state": state}, "triton")
    for split in range(1, T):
        head = {k: x[:, :split] for k, x in args.items()}
        tail = {k: x[:, split:] for k, x in args.items()}
        first, middle = call({**head, "state": state}, "triton")
        second, last = call({**tail, "state": middle}, "triton")
        assert relative_rms(torch.cat([first, second], 1), expected.double()) < 1e-6
        assert relative_rms(last, end.double()) < 1e-6


@pytest.mark.parametrize("split", [1, 31, 64])
def test_gradients_pass_through_a_state_handed_over(split):
    args = inputs(1, 70, 2, 32)
    exact = exact_results(args)
    leaves = {k: x.clone().requires_grad_() for k, x in args.items()}
    tokens = {k: x for k, x in leaves.items() if k != "state"}
    head = {k: x[:, :split] for k, x in tokens.items()}
    tail = {k: x[:, split:] for k, x in tokens.items()}
    first, middle = call({**head, "state": leaves["state"]}, "triton")
    second, end = call({**tail, "state": middle}, "triton")
    outputs = torch.cat([first, second], 1), end
    seeds = [randn(*out.shape, seed=1) for out in outputs]
    got = torch.autograd.grad(outputs, list(leaves.values()), seeds)
    for name, gradient in zip(leaves, got, strict=True):
        assert relative_rms(gradient, exact[f"d{name}"]) < 2e-6, name


def test_batch_rows_do_not_touch():
    args = inputs(3, 40, 1, 32)
    order = [2, 0, 1]
    expected = results(args, "triton")
    got = results({k: x[order] for k, x in args.items()}, "triton")
    for name in ("y", "end"):
        assert torch.equal(got[name], expected[name][order])
    alone = results({k: x[1:2] for k, x in args.items()}, "triton")
    assert torch.equal(alone["y"], expected["y"][1:2])


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("changed", [1, 40, 64, 80])
def test_the_future_changes_nothing(changed, segments, short_stretches):
    """To the last bit: nor does a later decay change how earlier outputs are rounded."""
    args = inputs(1, 96, 1, 32)
    assert segments_of(96, Plan(segments)) == segments
    y, _ = call(args, "triton", Plan(segments))
    for name in TOKENS:
        args[name][:, changed:] *= 1.5
    z, _ = call(args, "triton", Plan(segments))
    assert torch.equal(z[:, :changed], y[:, :changed])
    assert (z[:, changed:] != y[:, changed:]).all()


def test_repeats_give_the_same_bits():
    args, plan = inputs(1, 140, 1, 32), Plan(2)
    assert segments_of(140, plan) == 2
    expected = results(args, "triton", plan)
    for _ in range(5):
        assert_same(results(args, "triton", plan), expected)


def test_what_is_passed_in_stays():
    args = inputs(1, 40, 2, 32)
    before = {k: x.clone() for k, x in args.items()}
    results(args, "triton")
    wkv7_step_triton(*token(args))
    assert_same(args, before)


def token(args):
    """The arguments of a step: the last token's."""
    return [x if k == "state" else x[:, -1] for k, x in args.items()]


@pytest.mark.parametrize("N", [16, 32, 64, 128])
def test_a_step_is_the_definition(N):
    args = token(inputs(3, 2, 4, N))

    def defined(r, logits, *others):
        return wkv7_step(r, log_decay_of(logits), *others)

    def stepped(step, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in args]
        outputs = step(*leaves)
        seeds = [randn(*out.shape, seed=1).to(dtype) for out in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, seeds)]

    found = (
        stepped(wkv7_step_triton, torch.float32),
        stepped(defined, torch.float32),
        stepped(defined, torch.float64),
    )
    names = ("y", "end", *TOKENS, "state")
    for index, values in enumerate(zip(*found, strict=True)):
        assert_as_exact(*values, 2 if index < 2 else 3, names[index])


def test_a_step_of_non_contiguous_inputs():
    args = inputs(2, 3, 3, 32)
    expected = wkv7_step_triton(*token(args))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in token(args)]
    for others in (token(strided(args)), turned):
        for got, same in zip(wkv7_step_triton(*others), expected, strict=True):
            assert torch.equal(got, same)


def test_steps_equal_the_sequence():
    args = inputs(2, 6, 2, 32)
    y, end = call(args, "triton")
    state = args.pop("state")
    for t in range(6):
        y_t, state = wkv7_step_triton(*(x[:, t] for x in args.values()), state)
        assert relative_rms(y_t, y[:, t].double()) < 1e-6
    assert relative_rms(state, end.double()) < 1e-6


@interpreted
def test_bfloat16_is_refused_in_the_interpreter():
    with pytest.raises(BackendUnavailableError, match="interpreter computes bfloat16 wrongly"):
        call(inputs(1, 2, 1, 32, dtype=torch.bfloat16), "triton")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "has no kernels in float64; use 'torch'"),
        ({"N": 24}, "K = 24, V = 24; use 'torch'"),
    ],
)
def test_what_the_kernels_do_not_have_is_refused(changes, words):
    args = inputs(**{"B": 1, "T": 2, "H": 1, "N": 32, **changes})
    with pytest.raises(BackendUnavailableError, match=words):
        call(args, "triton")
    with pytest.raises(BackendUnavailableError, match=words):
        wkv7_step_triton(*token(args))


def test_values_of_another_size_are_refused():
    args = inputs(1, 2, 1, 32, state=False)
    args["v"] = randn(1, 2, 1, 64)
    with pytest.raises(BackendUnavailableError, match="K = 32, V = 64; use 'torch'"):
        call(args, "triton")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends_have_no_plans(backend):
    with pytest.raises(ValueError, match="plan is for backend 'triton'"):
        call(inputs(1, 2, 1, 32), backend, Plan(1))


@pytest.mark.parametrize("segments", [0, -1])
def test_a_plan_without_segments_is_refused(segments):
    with pytest.raises(ValueError, match=f"one segment at least, got {segments}"):
        call(inputs(1, 2, 1, 32), "triton", Plan(segments))


@pytest.mark.parametrize(
    ("shape", "segments"),
    [
        ((8, 4096, 32, 64), 1),
        ((1, 32768, 132, 64), 1),
        ((1, 32768, 32, 64), 17),
        ((1, 8192, 8, 64), 8),  # of 1,024 tokens
        ((1, 1000, 1, 64), 1),
    ],
)
def test_the_plan_fills_the_gpu(shape, segments):
    assert op.plan(shape, "cpu") == Plan(segments)


def test_the_plan_is_followed(monkeypatch):
    args = inputs(1, 300, 1, 32, state=False)
    seen = []
    monkeypatch.setattr(op, "plan", lambda shape, device: seen.append((shape, device)) or Plan(2))
    _, counts = traffic.count(lambda: call(args, "triton"))
    assert (counts.launches, counts.operation_calls) == (2, 0)
    assert seen == [((1, 300, 1, 32), args["r"].device)]
    _, counts = traffic.count(lambda: call(args, "triton", Plan(1)))
    assert counts.launches == 1
    assert len(seen) == 1


@pytest.mark.parametrize("state", [True, False])
def test_operations_keep_pytorchs_rules(state):
    args = inputs(1, 40, 2, 32, state=state)
    tensors = [args[k].requires_grad_() for k in TOKENS]
    start = args["state"].requires_grad_() if state else None
    ops = torch.ops.seqscale
    torch.library.opcheck(ops.wkv7.default, (*tensors, start, True, 1, True))
    detached = [x.detach() for x in tensors]
    dend = randn(1, 2, 32, 32) if state else None
    kept = torch.zeros(1, 1, 2, 32, 32)
    torch.library.opcheck(
        ops.wkv7_backward.default,
        (randn(1, 40, 2, 32), dend, *detached, kept, True, 1, state),
    )
    if state:
        torch.library.opcheck(ops.wkv7_step.default, (*token(args), True))


def test_torch_compile_needs_no_graph_break():
    args = inputs(1, 40, 2, 32)

    def function(r, decay, k, v, a, b, state):
        y, end = wkv7(2 * r, None, k, v, a, b, state, decay_logits=decay, backend="triton")
        return 3 * y, end

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in args.values()]
        outputs = function(*leaves)
        seeds = [randn(*out.shape, seed=1) for out in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, seeds)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradients(compiled), gradients(function), strict=True):
        assert torch.equal(got, expected)


def test_flops_are_those_of_the_recurrence():
    B, T, H, N = 1, 40, 2, 32
    args = {k: x.requires_grad_() for k, x in inputs(B, T, H, N).items()}
    with FlopCounterMode(display=False) as counter:
        y, _ = call(args, "triton")
        assert counter.get_total_flops() == 9 * B * T * H * N**2
        y.sum().backward()
        assert counter.get_total_flops() == 3 * 9 * B * T * H * N**2
    with FlopCounterMode(display=False) as counter:
        wkv7_step_triton(*token(args))
    assert counter.get_total_flops() == 9 * B * H * N**2


@on_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("T", [1, 65, 1025])
@pytest.mark.parametrize("segments", [1, 4])
def test_on_a_gpu(T, dtype, segments):
    for N in (16, 32, 64, 128):
        args = inputs(2, T, 4, N, dtype=dtype)
        check(args, Plan(segments))
    expected = results(args, "triton", Plan(segments))
    for _ in range(50):
        assert_same(results(args, "triton", Plan(segments)), expected)


@on_a_gpu
@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of GPU memory")
    T, H, N = 2**19 + 130, 64, 64
    last = slice(T - 200, T)

    def tokens():
        return torch.randn(1, T, H, N, device=DEVICE, dtype=torch.bfloat16)

    a, b = removal(1, 1, H, N)
    a, b = (x.to(torch.bfloat16).expand(1, T, H, N).contiguous() for x in (a, b))
    args = [tokens(), tokens() + 3, tokens(), tokens(), a, b]
    y, _ = call(dict(zip(TOKENS, args, strict=True)), "triton")
    few = {k: x[:, last] for k, x in zip(TOKENS, args, strict=True)}
    expected, _ = call(few, "torch")
    assert relative_rms(y[:, -100:], expected[:, -100:].double()) < 8e-3
