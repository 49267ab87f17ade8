"""Libraries' operations: each against ours in float64, and in place of ours in blocks."""

import copy
import subprocess
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import archs
from archs.hyena import HyenaBlock
from archs.mamba2 import Mamba2Block
from archs.ops.attention import attention
from archs.ops.long_conv import long_conv
from archs.ops.ssd import ssd
from archs.ops.wkv7 import wkv7
from harness import peer_calls, peers, workload
from harness.correctness import ALLOWED_ERROR, relative_error
from harness.environment import code_hash
from harness.peers import PEERS
from harness.record import AGAIN, Case

GPU = torch.cuda.is_available()
ARCHS = {"attention": "transformer", "ssd": "mamba2", "wkv7": "rwkv7", "long_conv": "hyena"}
CPU_PEERS = [name for name, peer in PEERS.items() if not peer.needs_gpu]
GPU_PEERS = ["mamba_ssm", "fla", "sdpa-flash", "sdpa-cudnn", "flash-attn"]


def on_gpu(name):
    """A peer's tests on a GPU."""
    reason = PEERS[name].unavailable("cuda") if GPU else "no NVIDIA GPU"
    marks = [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=str(reason))]
    return pytest.param(name, "cuda", "bfloat16", marks=marks, id=f"{name}-gpu")


PLACES = [
    *(pytest.param(name, "cpu", "float32", id=name) for name in CPU_PEERS),
    *map(on_gpu, GPU_PEERS),
]


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_same_function(call, ours, inputs, tolerance):
    """Both on the same tensors, which are leaves: results and the gradient of every leaf."""
    found = []
    for function, dtype in ((call, None), (ours, torch.float64)):
        leaves = {
            name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()
        }
        result = function(**leaves)
        results = [r for r in (result if isinstance(result, tuple) else (result,)) if r is not None]
        weights = [randn(*r.shape, seed=9).to(r.dtype) for r in results]
        loss = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
        found.append((results, torch.autograd.grad(loss, list(leaves.values()))))
    (results, gradients), (expected, expected_gradients) = found
    assert len(results) == len(expected)
    for got, wanted in zip(results, expected, strict=True):
        assert relative_error(got, wanted) <= tolerance
    for name, got, wanted in zip(inputs, gradients, expected_gradients, strict=True):
        assert got.dtype == inputs[name].dtype
        if wanted.abs().max() > 1e-12:
            assert relative_error(got, wanted) <= tolerance, name
        else:  # one key alone: the query has no gradient
            assert got.abs().max() <= tolerance, name


def test_every_peer_is_of_an_operation_and_says_what_it_is():
    for name, peer in PEERS.items():
        assert peer.name == name
        assert peer.op in peers.OUR_OPERATIONS
        assert set(peer.record()) == {"package", "version", "options"}
    assert {peer.op for peer in PEERS.values()} == set(ARCHS)


# Against the reference in float64.


@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-math"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("T", "S", "H", "H_kv"),
    [(1, 1, 2, 2), (1, 17, 4, 2), (2, 2, 2, 2), (17, 17, 4, 2), (5, 64, 4, 4), (65, 130, 4, 1)],
)
def test_attention_is_causal_at_the_end_and_shares_keys(name, dtype, tolerance, T, S, H, H_kv):
    inputs = {"q": randn(2, T, H, 8, dtype=dtype)}
    inputs |= {x: randn(2, S, H_kv, 8, seed=i, dtype=dtype) for i, x in enumerate("kv", start=1)}
    ours = partial(attention, backend="reference")
    assert_same_function(PEERS[name].call, ours, inputs, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("T", [1, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize("extras", [(), ("dt", "skip"), ("dt", "skip", "state")])
def test_the_listing_of_ssd_is_ours(dtype, tolerance, T, G, extras):
    H, P, N = 4, 3, 5
    inputs = {
        "x": randn(2, T, H, P),
        "log_decay": -randn(2, T, H, seed=1).exp(),
        "b": randn(2, T, G, N, seed=2),
        "c": randn(2, T, G, N, seed=3),
        "dt": randn(2, T, H, seed=4).exp(),
        "skip": randn(H, seed=5),
        "state": randn(2, H, P, N, seed=6),
    }
    inputs = {
        name: x.to(dtype)
        for name, x in inputs.items()
        if name in extras or name in ("x", "log_decay", "b", "c")
    }
    ours = partial(ssd, backend="reference")
    assert_same_function(PEERS["ssd-minimal"].call, ours, inputs, tolerance)


LONG_CONV_EXTRAS = [
    (),
    ("skip",),
    ("pre_gate", "skip"),
    ("pre_gate", "post_gate", "skip", "short_filters", "short_bias"),
    ("pre_gate", "post_gate", "short_filters"),
    ("post_gate", "skip", "history"),
    ("pre_gate", "history"),
]


def long_conv_inputs(T, extras, dtype, D=4, S=6):
    inputs = {
        "u": randn(2, D, T),
        "filter": randn(D, T + S + 3, seed=1),
        "pre_gate": randn(2, D, T, seed=2),
        "post_gate": randn(2, D, T, seed=3),
        "skip": randn(D, seed=4),
        "short_filters": randn(3, D, 3, seed=5),
        "short_bias": randn(3, D, seed=6),
        "history": randn(2, D, S, seed=7),
    }
    return {
        name: x.to(dtype) for name, x in inputs.items() if name in extras or name in ("u", "filter")
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("T", [1, 2, 17, 64, 127])
@pytest.mark.parametrize("extras", LONG_CONV_EXTRAS, ids="+".join)
def test_the_convolution_by_torch_fft_is_ours(dtype, tolerance, T, extras):
    inputs = long_conv_inputs(T, extras, dtype)
    ours = partial(long_conv, backend="reference")
    assert_same_function(PEERS["torch-fft"].call, ours, inputs, tolerance)


# Adapters of libraries that need a GPU, with a library made up of our operations.


@pytest.fixture
def planted(monkeypatch):
    """Plants modules under names of libraries, with these functions; returns the calls' options."""

    def plant(module, **functions):
        calls = []

        def recording(function):
            def call(*arguments, **options):
                calls.append(options)
                return function(*arguments, **options)

            return call

        made = types.ModuleType(module)
        for name, function in functions.items():
            setattr(made, name, recording(function))
        monkeypatch.setitem(sys.modules, module, made)
        for i, letter in enumerate(module):
            if letter == ".":
                monkeypatch.setitem(sys.modules, module[:i], types.ModuleType(module[:i]))
        return calls

    return plant


@pytest.fixture
def mamba_ssm(planted, monkeypatch):
    """mamba_ssm's function with our operation in it, in float32 on the CPU."""

    def chunk_scan(x, dt, A, b, c, chunk_size, D, initial_states, return_final_states):
        assert A.shape == (x.shape[2],)
        assert chunk_size == 256
        assert return_final_states == (initial_states is not None)
        y, state = ssd(x, A * dt, b, c, initial_states, dt=dt, skip=D, backend="torch")
        return (y, state) if return_final_states else y

    monkeypatch.setattr(peer_calls, "import_mamba_ssm", lambda: None)
    return planted("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=chunk_scan)


@pytest.mark.parametrize("with_state", [False, True])
def test_mamba_ssm_reads_the_rate_off_the_first_token_and_gradients_are_exact(
    mamba_ssm, with_state
):
    """As a block forms log_decay: of A_log, dt_bias and logits of dt, whose gradients count."""
    B, T, H, P, N = 2, 70, 3, 4, 5
    inputs = {
        "x": randn(B, T, H, P),
        "b": randn(B, T, 1, N, seed=1),
        "c": randn(B, T, 1, N, seed=2),
        "skip": randn(H, seed=3),
        "A_log": randn(H, seed=4),
        "dt_bias": randn(H, seed=5),
        "dt_logits": randn(B, T, H, seed=6),
    }
    if with_state:
        inputs["state"] = randn(B, H, P, N, seed=7)

    def through(operation):
        def call(A_log, dt_bias, dt_logits, **others):
            dt = F.softplus(dt_logits + dt_bias)
            return operation(log_decay=-A_log.exp() * dt, dt=dt, **others)

        return call

    # The stand-in refuses float64, and runs in float32: its tolerance.
    inputs = {name: x.float() for name, x in inputs.items()}
    ours = partial(ssd, backend="reference")
    assert_same_function(through(PEERS["mamba_ssm"].call), through(ours), inputs, 2e-5)
    assert len(mamba_ssm) == 1


def test_importing_mamba_ssm_needs_no_cuda_extension():
    code = (
        "import sys; from harness.peers import import_mamba_ssm; module = import_mamba_ssm();"
        "assert import_mamba_ssm() is module;"
        "from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as found;"
        "assert callable(found); print(module.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == PEERS["mamba_ssm"].version


def test_mamba_ssms_own_kernels_agree_in_the_interpreter():
    script = Path(__file__).with_name("interpreted_mamba.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 1e-5


def test_flash_attn_is_called_as_documented(planted):
    def function(q, k, v, causal, window_size):
        assert causal
        window = None if window_size == (-1, -1) else window_size[0] + 1
        assert window_size[1] == (-1 if window is None else 0)
        return attention(q, k, v, window=window, backend="torch")

    calls = planted("flash_attn", flash_attn_func=function, flash_attn_with_kvcache=function)
    for T, window in ((9, None), (9, 4), (1, None)):
        q, k, v = (randn(2, T if i == 0 else 12, 4 if i == 0 else 2, 8, seed=i) for i in range(3))
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        y = PEERS["flash-attn"].call(q, k, v, window=window)
        assert relative_error(y, attention(q, k, v, window=window, backend="reference")) < 1e-2
    assert len(calls) == 3


def test_flash_attn_decodes_with_its_decoding_kernel_where_nothing_is_differentiated(planted):
    names = []
    functions = {
        name: lambda q, *_, _name=name, **__: names.append(_name) or q
        for name in ("flash_attn_func", "flash_attn_with_kvcache")
    }
    planted("flash_attn", **functions)
    one, two = (torch.zeros(1, T, 1, 8, dtype=torch.bfloat16) for T in (1, 2))
    with torch.no_grad():
        PEERS["flash-attn"].call(one, two, two)
        PEERS["flash-attn"].call(two, two, two)
    PEERS["flash-attn"].call(one, two, two)
    assert names == ["flash_attn_with_kvcache", "flash_attn_func", "flash_attn_func"]


@pytest.mark.parametrize("by_logits", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_fla_is_told_the_bound_of_the_decay(planted, by_logits, with_state):
    def chunk_rwkv7(r, w, k, v, a, b, initial_state, output_final_state, lower_bound):
        assert output_final_state == (initial_state is not None)
        assert (w >= lower_bound).all()
        assert lower_bound == pytest.approx(-0.60653066)
        return wkv7(r, w, k, v, a, b, initial_state, backend="torch")

    planted("fla.ops.rwkv7", chunk_rwkv7=chunk_rwkv7)
    B, T, H, K = 2, 40, 2, 8
    removal = F.normalize(randn(B, T, H, K, seed=1), dim=-1)
    decay = randn(B, T, H, K, seed=2)
    inputs = {
        "r": randn(B, T, H, K),
        "k": randn(B, T, H, K, seed=3),
        "v": randn(B, T, H, K, seed=4),
        "a": -removal,
        "b": removal * torch.sigmoid(randn(B, T, H, K, seed=5)),
    }
    if with_state:
        inputs["state"] = randn(B, H, K, K, seed=6)
    inputs |= {"decay_logits": decay} if by_logits else {"log_decay": -0.6 * decay.sigmoid()}
    inputs = {name: x.float() for name, x in inputs.items()}

    def with_defaults(operation):
        return lambda **given: operation(**{"log_decay": None, **given})

    ours = with_defaults(partial(wkv7, backend="reference"))
    assert_same_function(with_defaults(PEERS["fla"].call), ours, inputs, 2e-5)


@pytest.mark.parametrize("T", [1, 6, 127, 130])
@pytest.mark.parametrize("extras", LONG_CONV_EXTRAS, ids="+".join)
def test_flashfftconv_has_its_gates_fused_and_sizes_it_takes(planted, T, extras):
    made = []

    class FlashFFTConv(torch.nn.Module):
        def __init__(self, seqlen, dtype):
            super().__init__()
            made.append((seqlen, dtype))
            self.seqlen = seqlen

        def forward(self, u, k, pregate=None, postgate=None):
            L = u.shape[2]
            assert L % 4 == 0
            assert 256 <= self.seqlen >= 2 * L
            assert k.dtype == torch.float32
            assert (pregate is None) == (postgate is None)
            assert all(x is None or x.is_contiguous() for x in (u, k, pregate, postgate))
            u = u if pregate is None else u * pregate
            spectrum = torch.fft.rfft(u.float(), n=self.seqlen) * torch.fft.rfft(k, n=self.seqlen)
            y = torch.fft.irfft(spectrum, n=self.seqlen)[..., :L].to(u.dtype)
            return y if postgate is None else y * postgate

    peer_calls._flash_fft.cache_clear()
    planted("flashfftconv", FlashFFTConv=FlashFFTConv)
    inputs = long_conv_inputs(T, extras, torch.float16)
    inputs["filter"] = inputs["filter"].float()
    ours = partial(long_conv, backend="reference")
    assert_same_function(PEERS["flashfftconv"].call, ours, inputs, 4e-3)
    tokens = T + (6 if "history" in extras else 0)
    assert made == [(512 if tokens > 128 else 256, torch.float16)]
    peer_calls._flash_fft.cache_clear()


def test_what_a_library_cannot_do_is_refused():
    q = torch.zeros(1, 9, 1, 8)
    u, filter = torch.zeros(1, 3, 40000, dtype=torch.bfloat16), torch.zeros(3, 40000)
    vast, taps = torch.zeros(1, 16, 1, dtype=torch.float16), torch.zeros(16, 1)
    history = torch.empty(1, dtype=torch.float16).expand(1, 16, 1 << 21)
    x, b = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    dt = torch.ones(1, 2, 1)
    for call, words in (
        (lambda: PEERS["sdpa-math"].call(q, q, q, window=4), "no sliding window"),
        (lambda: PEERS["sdpa-math"].call(q, q, q, lengths=torch.tensor([9])), "ragged"),
        (lambda: peer_calls.sdpa(SDPBackend.EFFICIENT_ATTENTION)(q, q, q), "EFFICIENT"),
        (lambda: PEERS["flash-attn"].call(q, q, q), "float32"),
        (lambda: PEERS["flash-attn"].call(q, q, q, lengths=torch.tensor([9])), "ragged"),
        (lambda: PEERS["mamba_ssm"].call(x, -dt, b, b), "needs dt"),
        (lambda: PEERS["mamba_ssm"].call(x.double(), -dt, b, b, dt=dt), "float64"),
        (lambda: PEERS["fla"].call(*[q.double()] * 6), "float64"),
        (lambda: PEERS["flashfftconv"].call(u.float(), filter), "float32"),
        (lambda: PEERS["flashfftconv"].call(u, filter), "16 channels"),
        (lambda: PEERS["flashfftconv"].call(vast, taps, history=history), "8388608 points"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            call()
    PEERS["sdpa-math"].call(q, q, q, window=9)  # all that there is


# What can be imported, and what is said of the rest.


def test_a_peer_that_is_not_there_is_one_line_with_the_remedy(monkeypatch):
    for name, peer in PEERS.items():
        assert (peer.unavailable("cpu") is None) == (name in CPU_PEERS)
        if peer.needs_gpu:
            assert peer.unavailable("cpu") == "needs an NVIDIA GPU"

    def broken(error):
        def load():
            raise error

        return load

    for name, error, words in (
        ("fla", ModuleNotFoundError("No module named 'fla'"), "No module named 'fla'; run: pip"),
        ("flash-attn", OSError("undefined symbol\n_ZN"), "OSError: undefined symbol _ZN; run"),
    ):
        peer = replace(PEERS[name], load=broken(error))
        said = peer.unavailable("cuda")
        assert said.startswith("not importable because")
        assert words in said
        assert said.isprintable()
    monkeypatch.setattr(peer_calls, "find_spec", lambda name: None)
    peer_calls.import_mamba_ssm.cache_clear()
    said = PEERS["mamba_ssm"].unavailable("cuda")
    assert "mamba-ssm is not installed; run: MAMBA_SKIP_CUDA_BUILD=TRUE" in said
    assert said.count("run:") == 1


def test_a_peers_number_is_of_its_calling_code_and_its_librarys_version(monkeypatch):
    hashes = {code_hash("mamba2"), code_hash("mamba2", "ssd-minimal")}
    assert code_hash("mamba2", AGAIN) == code_hash("mamba2")
    monkeypatch.setattr(peers, "installed_version", lambda package: "another")
    assert code_hash("mamba2", "ssd-minimal") not in hashes
    assert len(hashes) == 2


# In place of ours.


def case(name, level, phase, **changes):
    place = {"seq_len": None, "position": 40} if phase == "decode" else {"seq_len": 40}
    asked = {"kind": "cost", "batch": 2, "size": "d128", "implementation": name, **place, **changes}
    return Case(arch=ARCHS[PEERS[name].op], level=level, phase=phase, **asked)


LEVELS = [
    (level, phase)
    for level, phases in {
        "op": ("forward", "backward", "decode"),
        "block": ("forward", "backward", "train_step", "prefill", "decode"),
        "model": ("train_step", "prefill", "decode"),
    }.items()
    for phase in phases
]


@pytest.fixture
def called(monkeypatch):
    """How often a peer was called; its call may be replaced by another."""

    def watch(name, call=None):
        calls, peer = [], PEERS[name]
        real = call or peer.call

        def counting(*arguments, **options):
            calls.append(1)
            return real(*arguments, **options)

        monkeypatch.setitem(PEERS, name, replace(peer, call=counting))
        return calls

    return watch


@pytest.mark.parametrize(("name", "device", "dtype"), PLACES)
@pytest.mark.parametrize(("level", "phase"), LEVELS)
def test_every_cell_runs_with_the_peer_and_is_right(called, name, device, dtype, level, phase):
    asked = case(name, level, phase, dtype=dtype)
    calls = called(name)
    if phase == "decode" and not PEERS[name].has_step:
        with pytest.raises(NotImplementedError, match="has no step of its own"):
            workload.build(asked, device)
        return
    built = workload.build(asked, device)
    before = built.check()
    built.function()
    assert 0 < max(before, built.check()) <= ALLOWED_ERROR[dtype]
    assert calls


@pytest.mark.parametrize("name", ["sdpa-math", "ssd-minimal", "torch-fft"])
@pytest.mark.parametrize(
    ("level", "phase"), [(level, phase) for level, phase in LEVELS if phase != "decode"]
)
def test_a_peer_that_is_wrong_by_one_in_a_thousand_is_found(called, name, level, phase):
    real = PEERS[name].call

    def wrong(*arguments, **options):
        result = real(*arguments, **options)
        y, *rest = result if isinstance(result, tuple) else (result,)
        y = y + 1e-3 * y.roll(1, 1 if name == "torch-fft" else -1)
        return (y, *rest) if rest else y

    called(name, wrong)
    assert workload.build(case(name, level, phase)).check() > ALLOWED_ERROR["float32"]


def test_a_peer_that_is_wrong_in_the_middle_of_a_long_sequence_is_found(called):
    """Where the fold does not reach: as a kernel, it is compared with `torch` at full length."""
    real = PEERS["sdpa-math"].call

    def wrong(q, k, v, **options):
        y = real(q, k, v, **options)
        y.data[:, 500] *= 2
        return y

    called("sdpa-math", wrong)
    for phase in ("forward", "backward"):
        built = workload.build(case("sdpa-math", "op", phase, seq_len=1000))
        assert (built.check() > ALLOWED_ERROR["float32"]) == (phase == "forward")


def test_a_peer_that_is_wrong_beyond_the_fold_is_found_in_a_prompt(called):
    """There the whole is compared with `torch` in float64: ours, not the peer's own."""
    real = PEERS["ssd-minimal"].call

    def wrong(x, *arguments, **options):
        y, state = real(x, *arguments, **options)
        return (y + 1e-2 * y.roll(1, -1) if x.shape[1] > 100 else y), state

    called("ssd-minimal", wrong)
    asked = case("ssd-minimal", "block", "prefill", seq_len=120)
    assert workload.build(asked).check() > ALLOWED_ERROR["float32"]
    called("ssd-minimal", real)
    assert workload.build(asked).check() <= ALLOWED_ERROR["float32"]


def test_a_float64_cell_of_a_peer_is_the_peers_and_its_reference_ours(called):
    calls = called("sdpa-math")
    built = workload.build(case("sdpa-math", "block", "forward", dtype="float64"))
    built.function()
    assert len(calls) == 1
    assert 0 < built.check() <= ALLOWED_ERROR["float64"]
    assert len(calls) == 2


def test_on_the_reference_backend_a_block_with_a_peer_is_ours(called):
    calls = called("sdpa-math")
    block = archs.build_block("transformer", width=64, backend="reference")
    peers.stand_in(PEERS["sdpa-math"], [block])
    block(torch.randn(1, 5, 64))
    assert calls == []
    block.backend = "torch"
    block(torch.randn(1, 5, 64))
    assert calls == [1]


def test_mamba_ssm_is_differentiated_by_its_own_leaves(mamba_ssm, monkeypatch):
    """A and dt, where ours has log_decay and dt; both checked against the fold of ours."""
    peer = replace(PEERS["mamba_ssm"], needs_gpu=False, load=lambda: None)
    monkeypatch.setitem(PEERS, "mamba_ssm", peer)
    for phase in ("forward", "backward"):
        built = workload.build(case("mamba_ssm", "op", phase, seq_len=300))
        assert 0 < built.check() <= ALLOWED_ERROR["float32"]
        gradients = built.function()
        if phase == "backward":
            shapes = [tuple(g.shape) for g in gradients]
            assert len(shapes) == 6
            assert shapes.count((4,)) == 2  # skip and A, of 4 heads
            assert shapes.count((2, 300, 4)) == 1  # dt


def test_a_wrong_gradient_of_the_rate_is_found(planted, monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, A):
            return A.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 1.001 * gradient

    def chunk_scan(x, dt, A, b, c, chunk_size, D, initial_states, return_final_states):
        return ssd(x, Wrong.apply(A) * dt, b, c, dt=dt, skip=D, backend="torch")[0]

    monkeypatch.setattr(peer_calls, "import_mamba_ssm", lambda: None)
    planted("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=chunk_scan)
    peer = replace(PEERS["mamba_ssm"], needs_gpu=False, load=lambda: None)
    monkeypatch.setitem(PEERS, "mamba_ssm", peer)
    built = workload.build(case("mamba_ssm", "op", "backward"))
    assert built.check() == pytest.approx(1e-3, rel=0.1)


def test_a_hybrid_has_the_peer_in_the_blocks_that_it_can_stand_in_for():
    asked = Case(
        kind="cost", arch="mamba2+transformer+hyena", level="model", phase="prefill", batch=1,
        seq_len=40, size="d64", implementation="ssd-minimal",
    )  # fmt: skip
    model = workload.build_model(asked, 41)
    names = [type(block.operation).__name__ for block in model.blocks]
    assert names == ["StandIn", "function", "function"]
    assert 0 < workload.build(asked).check() <= ALLOWED_ERROR["float32"]
    peers.restore(model.blocks)
    assert model.blocks[0].operation is ssd


def test_a_peer_that_stands_in_for_nothing_is_refused():
    for level in ("op", "block", "model"):
        asked = Case(
            kind="cost", arch="hyena", level=level, phase="forward", batch=1, seq_len=8,
            size="d64", implementation="ssd-minimal",
        )  # fmt: skip
        with pytest.raises(NotImplementedError, match="ssd-minimal implements ssd"):
            workload.build(asked)
    with pytest.raises(NotImplementedError, match="no reference"):
        workload.build(case("ssd-minimal", "op", "forward", backend="reference"))
    with pytest.raises(NotImplementedError, match="no implementation 'mamba'"):
        workload.build(Case(**{**case("ssd-minimal", "op", "forward").asked(),
                               "implementation": "mamba"}))  # fmt: skip


# The contract, in the type that each device is used in: the rest of it is held in
# tests/archs/test_contract.py, in float64, which no GPU library takes.


def contract_block(name, device, dtype):
    """A block with the peer, one of ours in float64 with the same weights, and tokens."""
    torch.manual_seed(0)
    fields = {"transformer": {"kv_heads": 1}, "mamba2": {"d_state": 64}}
    arch = ARCHS[PEERS[name].op]
    block = archs.build_block(arch, width=128, max_len=400, **fields.get(arch, {}))
    generator = torch.Generator().manual_seed(7)
    workload.redraw(block, generator)
    block = block.to(device, getattr(torch, dtype))
    exact = copy.deepcopy(block).double()
    exact.backend = "reference"
    peers.stand_in(PEERS[name], [block])
    x = randn(2, 300, 128).to(device, getattr(torch, dtype))
    return block, exact, x


def fresh(block, x):
    return block.init_state(len(x), 400, device=x.device, dtype=x.dtype)


@pytest.mark.parametrize(("name", "device", "dtype"), PLACES)
class TestContract:
    def test_forward_is_the_fold_of_the_step_whatever_the_length(self, name, device, dtype):
        block, exact, x = contract_block(name, device, dtype)
        with torch.no_grad():
            state, folded = fresh(exact, x.double()), []
            for token in x[:, :70].double().unbind(1):
                y, state, _ = exact.step(token, state)
                folded.append(y)
            folded = torch.stack(folded, 1)
            for T in (1, 2, 17, 64, 65, 70):
                y, state, _ = block(x[:, :T], fresh(block, x))
                assert (
                    relative_error(y - x[:, :T], folded[:, :T] - x[:, :T].double())
                    <= (ALLOWED_ERROR[dtype])
                )
                assert state.position == T
                assert y.dtype == x.dtype
                alone = block(x[:, :T])
                assert alone.state is None
                assert relative_error(alone.x, y) <= ALLOWED_ERROR[dtype]

    def test_every_split_hands_the_state_over(self, name, device, dtype):
        block, exact, x = contract_block(name, device, dtype)
        with torch.no_grad():
            expected = exact(x.double()).x
            for split in (1, 63, 64, 100, 256, 299):
                head, state, _ = block(x[:, :split], fresh(block, x))
                try:
                    tail, state, _ = block(x[:, split:], state)
                except NotImplementedError as refusal:
                    assert name == "sdpa-cudnn"  # which takes no mask of this form everywhere
                    pytest.skip(str(refusal))
                got = torch.cat((head, tail), 1)
                assert relative_error(got - x, expected - x.double()) <= ALLOWED_ERROR[dtype]
                assert state.position == 300

    def test_gradients_are_those_of_the_fold(self, name, device, dtype):
        block, exact, x = contract_block(name, device, dtype)
        weight = randn(2, 70, 128, seed=5).to(x)
        found = []
        for module, tokens in ((block, x[:, :70]), (exact, x[:, :70].double())):
            tokens = tokens.detach().requires_grad_()
            leaves = (tokens, *module.parameters())
            loss = (module(tokens).x * weight.to(tokens.dtype)).sum()
            found.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        names = ["x", *(name for name, _ in block.named_parameters())]
        for parameter, got, wanted in zip(names, *found, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                assert relative_error(got, wanted) <= 2 * ALLOWED_ERROR[dtype], parameter

    def test_rows_are_independent_and_the_past_does_not_see_the_future(self, name, device, dtype):
        block, _, x = contract_block(name, device, dtype)
        changed = x.clone()
        changed[:, 150] *= -1
        with torch.no_grad():
            y, after = block(x).x, block(changed).x
            alone = block(x[1:]).x
        assert relative_error(alone, y[1:]) <= ALLOWED_ERROR[dtype]
        # An FFT mixes all positions, and fla scales a chunk by the decay up to its middle: there
        # causality holds to rounding only.
        exact = PEERS[name].op in ("attention", "ssd")
        assert relative_error(after[:, :150], y[:, :150]) <= (0 if exact else ALLOWED_ERROR[dtype])
        assert (after[:, 150] - y[:, 150]).abs().max() > 1e-3


def test_blocks_call_the_operation_that_they_hold():
    """With a state too: the seam has two places in attention and in Hyena."""
    for arch in ARCHS.values():
        block = archs.build_block(arch, width=64, max_len=20)
        ours, calls = block.operation, []

        def counting(*arguments, _ours=ours, _calls=calls, **options):
            _calls.append(1)
            return _ours(*arguments, **options)

        block.operation = counting
        x = torch.randn(1, 8, 64)
        block(x)
        block(x, block.init_state(1, 20, device="cpu", dtype=torch.float32))
        assert len(calls) == 2, arch
    assert Mamba2Block(Mamba2Block.Config(width=64)).operation is ssd
    assert HyenaBlock(HyenaBlock.Config(width=64)).operation is long_conv
