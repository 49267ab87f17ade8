import copy
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import archs.hyena
from archs.block import parameter_bytes, projection_flops, state_bytes
from archs.hyena import HyenaBlock, HyenaConfig, long_conv_flops

LENGTHS = [1, 2, 3, 17, 127, 128, 129, 1000, 1025]


def build(dtype=torch.float64, seed=0, **fields):
    """A block whose every parameter is away from its initial value, and whose operator counts."""
    torch.manual_seed(seed)
    block = HyenaBlock(HyenaConfig(**{"width": 6, "max_len": 1100, **fields})).to(dtype)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if not name.startswith("filter."):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif name == "filter.frequency":
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return block


def tokens(B, T, D=6, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, D, generator=generator, dtype=torch.float64).to(dtype)


def relative(actual, expected):
    expected = expected.double()
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def official_filter(weights, config, length):
    """Taps (N-1, D, length), from the formulas of the official code.

    Channel v of filter o is the official output v (N-1) + o, which sets its decay.
    """
    L, orders = config.max_len, config.order - 1
    bands = (config.filter_features - 1) // 2
    p = torch.arange(length, dtype=torch.float64)
    f = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
    t = torch.linspace(0, 1, L, dtype=torch.float64)[:length, None]
    z = torch.exp(-1j * f[None] * (2 * math.pi * p / L)[:, None])
    h = torch.cat([t, z.real, z.imag], 1).to(weights["filter.frequency"].dtype)
    layers = ["filter.input"] + [f"filter.inner.{i}" for i in range(config.filter_inner_layers)]
    for layer in layers:
        h = torch.sin(
            weights["filter.frequency"]
            * (h @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"])
        )
    h = (h @ weights["filter.output.weight"].T).view(length, orders, config.width)
    deltas = torch.linspace(
        math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, config.width * orders, dtype=torch.float64
    )
    taps = torch.empty_like(h)
    for v in range(config.width):
        for o in range(orders):
            window = torch.exp(-t[:, 0] * deltas[v * orders + o].abs()) + config.window_shift
            taps[:, o, v] = h[:, o, v] * window.to(h.dtype)
    return taps.permute(1, 2, 0)


def rederived(weights, config, x):
    """The block straight from its formulas, with Toeplitz matrices instead of FFTs."""

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    T, order = x.shape[1], config.order
    signals = linear("in_proj", norm("operator_norm", x))
    short = weights["short_bias"] + weights["short_weight"][:, 2] * signals
    for age in (1, 2):
        late = torch.zeros_like(signals)
        late[:, age:] = signals[:, : max(0, T - age)]
        short = short + weights["short_weight"][:, 2 - age] * late
    *gates, v = short.chunk(order + 1, -1)
    filters = official_filter(weights, config, T)
    age = torch.arange(T)[:, None] - torch.arange(T)[None]
    for o in range(order - 1):
        z = v * gates[order - 1 - o]
        columns = []
        for d in range(config.width):
            toeplitz = torch.where(age >= 0, filters[o, d][age.clamp_min(0)], 0)
            columns.append(z[:, :, d] @ toeplitz.T + weights["skip"][o, d] * z[:, :, d])
        v = torch.stack(columns, -1)
    x = x + linear("out_proj", v * gates[0])
    a = linear("mlp_up", norm("mlp_norm", x))
    gelu = 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    return x + linear("mlp_down", gelu)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("T", LENGTHS)
def test_equals_the_formulas(T, order, dtype, tolerance):
    block = build(dtype, order=order, window_shift=0.05)
    x = tokens(2, T, dtype=dtype).requires_grad_()
    dy = tokens(2, T, dtype=dtype, seed=2)
    expected = rederived(block.state_dict(), block.config, x)
    (expected_gradient,) = torch.autograd.grad(expected, x, dy)
    y = block(x).x
    (gradient,) = torch.autograd.grad(y, x, dy)
    assert relative(y, expected) <= tolerance
    assert relative(gradient, expected_gradient) <= tolerance


def test_the_operator_matters_in_these_tests():
    block, x = build(), tokens(2, 100)
    y = block(x).x
    with torch.no_grad():
        block.filter.output.weight.zero_()
    assert relative(block(x).x, y) > 1e-2


@pytest.mark.parametrize("order", [2, 3])
def test_every_parameter_gradient_equals_the_formulas(order):
    block, x = build(order=order, max_len=80), tokens(2, 65)
    weights = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    dy = tokens(2, 65, seed=2)
    rederived(weights, block.config, x).backward(dy)
    block(x).x.backward(dy)
    for name, parameter in block.named_parameters():
        assert relative(parameter.grad, weights[name].grad) < 1e-10, name


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("features", [3, 33])
def test_filter_equals_the_official_formulas(order, features):
    block = build(order=order, filter_features=features, max_len=300, window_shift=0.1)
    taps = block.filter(300)
    assert taps.shape == (order - 1, 6, 300)
    assert relative(taps, official_filter(block.state_dict(), block.config, 300)) < 1e-12


def test_taps_do_not_depend_on_the_length_asked_for():
    block = build(max_len=1000)
    whole = block.filter(1000)
    for length in (1, 2, 500, 999):
        assert relative(block.filter(length), whole[..., :length]) < 1e-13


def test_taps_depend_on_max_len():
    block = build(max_len=1000)
    other = HyenaBlock(HyenaConfig(width=6, max_len=500)).double()
    other.load_state_dict(block.state_dict())
    # Half of the length makes every feature, and the window, run twice as fast.
    assert relative(other.filter(500)[..., 1:], block.filter(500)[..., 1:]) > 0.1
    assert other.filter(500)[..., -1].abs().max() < block.filter(500)[..., -1].abs().max()


def test_filter_of_max_len_one():
    assert build(max_len=1).filter(1).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_fused_and_from_a_state_agree(order, backend, dtype):
    block, x = build(dtype, order=order, max_len=130), tokens(2, 129, dtype=dtype)
    block.backend = backend
    with torch.no_grad():
        fused = block(x).x
        state = block.init_state(2, 129, device="cpu", dtype=dtype)
        stated = block(x, state).x
    assert relative(stated, fused) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("order", [2, 3])
def test_steps_and_splits_equal_the_whole(order, record):
    T = 65
    block, x = build(order=order, max_len=70), tokens(2, T)
    with torch.set_grad_enabled(record):
        whole = block(x).x
        state = block.init_state(2, T, device="cpu", dtype=x.dtype)
        ys = []
        for t in range(T):
            y, state, _ = block.step(x[:, t], state)
            ys.append(y)
        assert relative(torch.stack(ys, 1), whole) < 1e-12
        for split in range(1, T, 7):
            start = block.init_state(2, T, device="cpu", dtype=x.dtype)
            first = block(x[:, :split], start)
            second = block(x[:, split:], first.state)
            assert relative(torch.cat([first.x, second.x], 1), whole) < 1e-12
            for got, want in zip(second.state, state, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_gradients_through_the_state_equal_those_of_the_whole(order):
    block, x = build(order=order, max_len=40), tokens(2, 30).requires_grad_()
    dy = tokens(2, 30, seed=2)
    whole = torch.autograd.grad(block(x).x, (x, *block.parameters()), dy)
    state, ys = block.init_state(2, 40, device="cpu", dtype=x.dtype), []
    for part in (x[:, :13], x[:, 13:14], x[:, 14:29]):
        y, state, _ = block(part, state)
        ys.append(y)
    ys.append(block.step(x[:, 29], state).x.unsqueeze(1))
    parts = torch.autograd.grad(torch.cat(ys, 1), (x, *block.parameters()), dy)
    for got, want in zip(parts, whole, strict=True):
        assert relative(got, want) < 1e-10


@pytest.mark.parametrize("frozen", [False, True])
def test_history_is_written_in_place_only_without_gradients(frozen):
    block, x = build(max_len=20), tokens(1, 5)
    state = block.init_state(1, 20, device="cpu", dtype=x.dtype)
    with torch.no_grad():
        after = block(x, state).state
    assert after.history.data_ptr() == state.history.data_ptr()
    assert after.history[..., :5].abs().min() > 0
    assert (after.history[..., 5:] == 0).all()

    if frozen:
        # Only the filter learns: nothing in the state requires gradients, yet the graph reads it.
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name.startswith("filter."))
    before = after.history.clone()
    first = block.step(x[:, 0], after)
    second = block.step(x[:, 1], first.state)
    assert torch.equal(after.history, before)
    (first.x.sum() + second.x.sum()).backward()
    assert block.filter.frequency.grad.abs().max() > 0


def test_state_layout_and_bytes():
    block = HyenaBlock(HyenaConfig(width=6, max_len=50, order=3))
    state = block.init_state(2, 40, device="cpu", dtype=torch.bfloat16)
    assert state.short_tail.shape == (2, 24, 2)
    assert state.history.shape == (2, 2, 6, 40)
    assert state.short_tail.dtype == state.history.dtype == torch.bfloat16
    assert state_bytes(block, 2, 40, torch.bfloat16) == 2 * (2 * 24 * 2 + 2 * 2 * 6 * 40)


def test_channels_are_contiguous_where_the_convolution_reads_them(monkeypatch):
    seen = []
    true_long_conv = archs.hyena.long_conv

    def spy(u, filter, **named):
        y = true_long_conv(u, filter, **named)
        seen.extend([u, named["pre_gate"], named["post_gate"], filter, y])
        return y

    monkeypatch.setattr(archs.hyena, "long_conv", spy)
    build()(tokens(3, 50))
    assert [x.stride(-1) for x in seen] == [1] * 5
    assert [x.stride(-2) for x in seen] == [150, 150, 150, 50, 150]


def decode(block, x):
    with torch.no_grad():
        state = block.init_state(1, x.shape[1], device="cpu", dtype=x.dtype)
        ys = []
        for t in range(x.shape[1]):
            y, state, _ = block.step(x[:, t], state)
            ys.append(y)
        return torch.stack(ys, 1)


def in_one_pass(block, x):
    with torch.no_grad():
        return block(x).x


OPTIMISERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_decoding_follows_an_optimiser_step(optimiser):
    block, x = build(torch.float32, max_len=20), tokens(1, 12, dtype=torch.float32)
    learner = OPTIMISERS[optimiser](block.filter.parameters())
    before = decode(block, x)
    for _ in range(2):
        block(x).x.square().sum().backward()
        learner.step()
        after = decode(block, x)
        assert relative(after, in_one_pass(block, x)) < 1e-5
        assert relative(after, before) > 1e-3
        before = after


def test_decoding_follows_every_filter_parameter():
    block, x = build(max_len=20), tokens(1, 12)
    decode(block, x)
    for name, parameter in block.filter.named_parameters():
        with torch.no_grad():
            parameter.mul_(1.3)
        assert relative(decode(block, x), in_one_pass(block, x)) < 1e-12, name


def test_decoding_follows_load_copy_and_conversion():
    block, other, x = build(max_len=20), build(max_len=20, seed=5), tokens(1, 12)
    first = decode(block, x)

    twin = copy.deepcopy(block)
    with torch.no_grad():
        twin.filter.output.weight.mul_(3)
    assert relative(decode(twin, x), in_one_pass(twin, x)) < 1e-12
    assert torch.equal(decode(block, x), first)

    block.load_state_dict(other.state_dict())
    assert relative(decode(block, x), in_one_pass(block, x)) < 1e-12
    block.load_state_dict(twin.state_dict(), assign=True)
    assert relative(decode(block, x), in_one_pass(block, x)) < 1e-12

    block.bfloat16().double()
    assert relative(decode(block, x), in_one_pass(block, x)) < 1e-12
    block.float()
    single = x.float()
    assert relative(decode(block, single), in_one_pass(block, single)) < 1e-5


def test_converting_there_and_back_drops_the_filters():
    # The allocator may hand the old addresses out again, with version 0: nothing else would show.
    block = build(max_len=20)
    decode(block, tokens(1, 3))
    assert block.filter._materialised is not None
    block.to(torch.float64)
    assert block.filter._materialised is None


def test_filters_are_formed_once_for_many_steps():
    block, x = build(max_len=20), tokens(1, 12)
    calls = []
    block.filter.register_forward_hook(lambda *_: calls.append(1))
    decode(block, x)
    decode(block, x)
    assert len(calls) == 1


def test_a_model_made_and_run_in_inference_mode():
    with torch.inference_mode():
        block, x = build(max_len=20), tokens(1, 12)
        assert relative(decode(block, x), block(x).x) < 1e-12
        block.filter.output.weight.mul_(2)
        assert relative(decode(block, x), block(x).x) < 1e-12


def test_materialised_filters_are_not_saved():
    block = build(max_len=20)
    names = set(block.state_dict())
    decode(block, tokens(1, 3))
    assert set(block.state_dict()) == names
    assert not dict(block.named_buffers())


def test_recorded_steps_reach_the_filter_after_materialising():
    block, x = build(max_len=20), tokens(1, 4)
    decode(block, x)
    state = block.init_state(1, 20, device="cpu", dtype=x.dtype)
    block.step(x[:, 1], block.step(x[:, 0], state).state).x.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in block.filter.parameters())


@pytest.mark.parametrize(("dtype", "cap"), [(torch.bfloat16, 8e-3), (torch.float16, 2e-3)])
def test_reduced_types(dtype, cap):
    block = HyenaBlock(HyenaConfig(width=32, max_len=130)).to(dtype)
    x = tokens(2, 129, 32, dtype=dtype)
    exact = copy.deepcopy(block).double()
    with torch.no_grad():
        expected = exact(x.double()).x
        y = block(x).x
        state = block.init_state(2, 129, device="cpu", dtype=dtype)
        first = block(x[:, :100], state)
        second = block(x[:, 100:], first.state)
    assert y.dtype == second.x.dtype == second.state.history.dtype == dtype
    assert block.filter(5).dtype == torch.float32
    error = (y.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < cap
    assert relative(torch.cat([first.x, second.x], 1), y) < 4 * cap


def test_max_len_is_a_clear_limit():
    block, x = build(max_len=16), tokens(1, 20)
    for call in (
        lambda: block(x[:, :17]),
        lambda: block.init_state(1, 17, device="cpu", dtype=x.dtype),
    ):
        with pytest.raises(
            ValueError, match=r"17 tokens are more than max_len 16.*raise max_len when building"
        ):
            call()
    block(x[:, :16])

    state = block.init_state(1, 9, device="cpu", dtype=x.dtype)
    state = block(x[:, :8], state).state
    with pytest.raises(ValueError, match=r"room for 9 tokens, not 10.*max_len of at least 10"):
        block(x[:, :2], state)
    state = block.step(x[:, 8], state).state
    with pytest.raises(ValueError, match="room for 9 tokens, not 10"):
        block.step(x[:, 9], state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"order": 1}, "order must be at least 2"),
        ({"mlp_width": 0}, "mlp_width must be at least 1"),
        ({"filter_width": 0}, "filter_width must be at least 1"),
        ({"filter_inner_layers": -1}, "filter_inner_layers at least 0"),
        ({"filter_features": 4}, "filter_features must be odd and at least 3"),
        ({"filter_features": 1}, "filter_features must be odd and at least 3"),
        ({"width": 0}, "width and max_len must be positive"),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        HyenaConfig(**{"width": 8, **fields})


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    block = HyenaBlock(HyenaConfig(width=256, max_len=64), layer_index=1, depth=8)

    def deviation(tensor):
        return tensor.detach().double().std().item()

    for name in ("in_proj", "mlp_up", "filter.input", "filter.inner.0", "filter.output"):
        layer = block.get_submodule(name)
        assert deviation(layer.weight) == pytest.approx(0.02, rel=0.06), name
        assert layer.bias is None or (layer.bias == 0).all(), name
    for name in ("out_proj", "mlp_down"):
        layer = block.get_submodule(name)
        assert deviation(layer.weight) == pytest.approx(0.02 / 4, rel=0.03), name
        assert (layer.bias == 0).all(), name
    for tensor in (block.short_weight, block.short_bias):
        assert tensor.abs().max() <= 1 / math.sqrt(3)
        assert deviation(tensor) == pytest.approx(1 / 3, rel=0.06)  # uniform on +-1/sqrt(3)
    assert deviation(block.skip) == pytest.approx(1.0, rel=0.15)
    assert (block.filter.frequency == 14).all()
    assert block.filter.input.in_features == 33
    assert block.filter.input.out_features == 64
    assert len(block.filter.inner) == 2
    assert block.mlp_up.out_features == 1024


def test_parameters_are_only_those_of_the_paper():
    D, W, E = 8, 64, 33
    block = HyenaBlock(HyenaConfig(width=D, max_len=16))
    operator = (D * 3 * D + 3 * D) + 3 * D * 4 + D + (D * D + D)
    filter = (E * W + W) + 2 * (W * W + W) + W * D + W
    rest = 2 * 2 * D + (4 * D * D + 4 * D) + (4 * D * D + D)
    assert sum(p.numel() for p in block.parameters()) == operator + filter + rest


@pytest.mark.parametrize("order", [2, 3])
def test_flops_equal_those_counted_in_matrix_products(order):
    B, T = 2, 50
    block, x = build(torch.float32, order=order, max_len=64), tokens(B, T, dtype=torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(x)  # the counter sees no FFT
    ffn = block.shared_flops(T) - (order - 1) * 6 * long_conv_flops(T, 0)[1]
    assert counter.get_total_flops() == B * projection_flops(block, T) + ffn

    state = block.init_state(B, 64, device="cpu", dtype=x.dtype)
    with torch.no_grad():
        state = block(x, state).state
        with FlopCounterMode(display=False) as counter:
            block.step(x[:, 0], state)
    # The newest token is added by itself, outside of the product that is counted.
    dots = B * (order - 1) * 6 * (long_conv_flops(1, T)[0] - 2)
    assert counter.get_total_flops() == B * projection_flops(block, 1) + dots
    assert block.shared_flops(1, T) == 0


def test_flops_of_a_long_convolution():
    assert long_conv_flops(1, 0) == (2, 0)
    assert long_conv_flops(1, 999) == (2000, 0)
    assert long_conv_flops(3, 10) == (2 * (11 + 12 + 13), 0)
    # N = 8192: a real FFT at 2.5 N log2 N, N/2 products of 6.
    fft = 8192 * 13 * 5 // 2
    assert long_conv_flops(4096, 0) == (2 * fft + 3 * 8192, fft)
    for exponent in range(8, 17):
        spectra = sum(long_conv_flops(2**exponent, 0))
        assert spectra < 2**exponent * (2**exponent + 1)
        assert sum(long_conv_flops(2 ** (exponent + 1), 0)) < 2.3 * spectra


def test_mixer_flops_in_full():
    block = build(order=3)
    long = long_conv_flops(100, 0)[0]
    short, gates, skips = 2 * 3 * 4 * 100, 3 * 100, 2 * 2 * 100
    assert block.mixer_flops(100) == 6 * (2 * long + short + gates + skips)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bytes_of_a_step_are_weights_and_taps(dtype):
    block = build(dtype, order=3)
    tap_bytes = {torch.float64: 8, torch.bfloat16: 4}[dtype]
    outside = parameter_bytes(block) - parameter_bytes(block.filter)
    assert block.step_weight_bytes(0) == outside + 2 * 6 * tap_bytes
    assert block.step_weight_bytes(99) == outside + 2 * 6 * 100 * tap_bytes


def test_filter_layers_are_no_projections():
    block = build()
    named = {id(module): name for name, module in block.named_modules()}
    assert [named[id(layer)] for layer in block.projections()] == [
        "in_proj",
        "out_proj",
        "mlp_up",
        "mlp_down",
    ]
