import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from archs.block import forward_flops, projection_flops, state_bytes
from archs.layers import RMSNorm
from archs.mamba2 import GatedRMSNorm, Mamba2Block, Mamba2Config
from archs.ops import BackendUnavailableError

BACKENDS = ("reference", "torch")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(backend="torch", layer_index=0, depth=1, seed=0, **fields):
    torch.manual_seed(seed)
    fields = {"width": 32, "head_dim": 8, "d_state": 16} | fields
    return Mamba2Block(
        Mamba2Config(**fields), layer_index=layer_index, depth=depth, backend=backend
    )


def randomise(block):
    """Move the parameters that start at a constant."""
    with torch.no_grad():
        block.D.copy_(randn(*block.D.shape, seed=1))
        block.norm.weight.copy_(1 + 0.1 * randn(*block.norm.weight.shape, seed=2))


class TransformersMixer(nn.Module):
    """`transformers`' Mamba-2 mixer with a block's weights, in the block's pre-norm residual."""

    def __init__(self, block):
        super().__init__()
        from transformers.models.mamba2.configuration_mamba2 import Mamba2Config as TheirConfig
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        ours = block.config
        self.config = TheirConfig(
            hidden_size=ours.width,
            num_heads=ours.heads,
            head_dim=ours.head_dim,
            state_size=ours.d_state,
            expand=ours.expand,
            n_groups=ours.groups,
            conv_kernel=ours.conv_width,
            layer_norm_epsilon=ours.norm_eps,
            num_hidden_layers=1,
            chunk_size=32,
            use_bias=False,
            use_conv_bias=True,
        )
        self.pre_norm = block.pre_norm
        self.mixer = Mamba2Mixer(self.config, layer_idx=0)
        weights = {
            "in_proj.weight": block.in_proj.weight,
            "conv1d.weight": block.conv_weight[:, None],
            "conv1d.bias": block.conv_bias,
            "dt_bias": block.dt_bias,
            "A_log": block.A_log,
            "D": block.D,
            "norm.weight": block.norm.weight,
            "out_proj.weight": block.out_proj.weight,
        }
        self.mixer.load_state_dict(weights)  # strict: names every weight of both

    def forward(self, x, **cache):
        return x + self.mixer.torch_forward(self.pre_norm(x), **cache)


def assert_parity(got, expected):
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fields", [{}, {"conv_width": 3, "head_dim": 16, "expand": 3}])
def test_parity_with_transformers(backend, fields):
    block = build(backend, **fields)
    randomise(block)
    x = randn(2, 100, 32).requires_grad_()
    cotangent = randn(2, 100, 32, seed=3)
    theirs = TransformersMixer(block)
    expected, got = theirs(x), block(x).x
    # Without the residual, which would hide an error in the mixer.
    assert_parity(got - x, expected - x)
    assert_parity(
        torch.autograd.grad(got - x, x, cotangent)[0],
        torch.autograd.grad(expected - x, x, cotangent)[0],
    )
    weights = dict(theirs.mixer.named_parameters())
    pairs = {
        "A_log": block.A_log,
        "dt_bias": block.dt_bias,
        "D": block.D,
        "norm.weight": block.norm.weight,
        "conv1d.bias": block.conv_bias,
        "in_proj.weight": block.in_proj.weight,
    }
    ours = torch.autograd.grad(block(x).x, list(pairs.values()), cotangent)
    parameters = [weights[name] for name in pairs]
    for a, b in zip(ours, torch.autograd.grad(theirs(x), parameters, cotangent), strict=True):
        assert_parity(a, b)


def test_parity_with_transformers_when_decoding():
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Cache

    block = build()
    randomise(block)
    theirs = TransformersMixer(block)
    x = randn(2, 25, 32)
    cache = Mamba2Cache(theirs.config, 2, dtype=torch.float32)
    with torch.no_grad():
        theirs(x[:, :20], cache_params=cache, cache_position=torch.arange(20))
        _, state, _ = block(x[:, :20], block.init_state(2, 25, device="cpu", dtype=torch.float32))
        for t in range(20, 25):
            expected = theirs(
                x[:, t : t + 1], cache_params=cache, cache_position=torch.tensor([t])
            )[:, 0]
            got, state, _ = block.step(x[:, t], state)
            assert_parity(got - x[:, t], expected - x[:, t])
            assert_parity(state.ssm, cache.ssm_states[0])
            assert torch.allclose(state.conv, cache.conv_states[0][..., 1:], atol=1e-6)
    assert state.position == 25


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gated_norm_normalises_each_group_after_the_gate(groups):
    norm = GatedRMSNorm(24, groups, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(randn(24, seed=1))
    y, z = randn(3, 5, 24), randn(3, 5, 24, seed=2)
    gated = y * z * torch.sigmoid(z)
    parts = gated.split(24 // groups, dim=-1)
    normed = [p / (p.square().mean(-1, keepdim=True) + 1e-5).sqrt() for p in parts]
    assert torch.allclose(norm(y, z), torch.cat(normed, -1) * norm.weight, atol=1e-6)


def test_groups_are_separate_heads_with_their_own_b_and_c():
    # One block of two groups against two single-group mixers side by side.
    pair = build(groups=2)
    randomise(pair)
    inner, state = pair.config.inner_width, pair.config.d_state
    halves = [slice(0, inner // 2), slice(inner // 2, inner)]
    x = randn(2, 40, 32)
    expected = x
    for g, half in enumerate(halves):
        single = build(expand=1)
        rows = torch.arange(pair.in_proj.out_features)
        z, mixed, dt = rows.split([inner, pair.config.conv_channels, pair.config.heads])
        u, b, c = mixed.split([inner, 2 * state, 2 * state])
        own = slice(g * state, (g + 1) * state)
        channels = torch.cat([u[half], b[own], c[own]])
        heads = slice(4 * g, 4 * (g + 1))
        with torch.no_grad():
            single.in_proj.weight.copy_(
                pair.in_proj.weight[torch.cat([z[half], channels, dt[heads]])]
            )
            single.conv_weight.copy_(pair.conv_weight[channels - inner])
            single.conv_bias.copy_(pair.conv_bias[channels - inner])
            for name in ("dt_bias", "A_log", "D"):
                getattr(single, name).copy_(getattr(pair, name)[heads])
            single.norm.weight.copy_(pair.norm.weight[half])
            single.out_proj.weight.copy_(pair.out_proj.weight[:, half])
        expected = expected + single(x).x - x
    assert torch.allclose(pair(x).x, expected, atol=1e-5)


@given(
    B=st.integers(1, 3),
    T=st.integers(1, 80),
    heads=st.integers(1, 4),
    groups=st.integers(1, 2),
    head_dim=st.integers(1, 5),
    d_state=st.integers(1, 6),
    conv_width=st.integers(2, 4),
)
@settings(max_examples=15, deadline=None)
def test_forward_is_the_fold_of_step_at_any_shape(
    B, T, heads, groups, head_dim, d_state, conv_width
):
    heads *= groups
    block = build(
        width=heads * head_dim,
        expand=1,
        groups=groups,
        head_dim=head_dim,
        d_state=d_state,
        conv_width=conv_width,
    ).double()
    x = randn(B, T, heads * head_dim).double()
    with torch.no_grad():
        state = block.init_state(B, T, device="cpu", dtype=torch.float64)
        got, end, _ = block(x, state)
        folded = []
        for t in range(T):
            y, state, _ = block.step(x[:, t], state)
            folded.append(y)
    assert torch.allclose(got, torch.stack(folded, 1), rtol=0, atol=1e-11)
    assert torch.allclose(end.ssm, state.ssm, rtol=0, atol=1e-11)
    assert torch.allclose(end.conv, state.conv, rtol=0, atol=1e-11)
    assert end.position == state.position == T


def test_initialisation_is_the_official_one():
    block = build(width=2048, head_dim=4, d_state=4)  # 1024 heads
    dt = F.softplus(block.dt_bias)
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 0.1 * 1.001
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.15  # log-uniform: the mean is the middle
    decay = block.A_log.exp()
    assert decay.min() >= 1 - 1e-5
    assert decay.max() <= 16 + 1e-4
    assert abs(decay.mean() - 8.5) < 0.5  # uniform
    assert (block.D == 1).all()
    assert (block.norm.weight == 1).all()
    for weights in (block.conv_weight, block.conv_bias):
        assert 0.49 < weights.abs().max() <= 0.5  # 1 / sqrt(W)
    bound = 1 / math.sqrt(2048)
    assert 0.99 * bound < block.in_proj.weight.abs().max() <= bound
    deep = build(width=2048, head_dim=4, d_state=4, depth=9)
    for residual, depth in ((block, 1), (deep, 9)):
        bound = 1 / math.sqrt(4096 * depth)
        assert 0.99 * bound < residual.out_proj.weight.abs().max() <= bound


def test_a_floor_under_the_time_steps():
    block = build(dt_min=1e-6, dt_max=1e-5, dt_floor=1e-3)
    assert torch.allclose(F.softplus(block.dt_bias), torch.full((8,), 1e-3), rtol=1e-3)


def test_decay_parameters_are_exempt_from_weight_decay():
    block = build()
    exempt = {n for n, p in block.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert exempt == {"dt_bias", "A_log", "D"}


def test_time_steps_and_decays_are_formed_in_float32():
    block = build().bfloat16()
    log_decay, dt = block._discretise(randn(2, 3, 8).bfloat16())
    assert log_decay.dtype == dt.dtype == torch.float32
    log_decay, _ = block.double()._discretise(randn(2, 3, 8).double())
    assert log_decay.dtype == torch.float64


def test_state_is_constant_in_the_length():
    block = build(groups=2)
    assert state_bytes(block, 3, 10, torch.float32) == state_bytes(block, 3, 10**6, torch.float32)
    state = block.init_state(3, 10, device="meta", dtype=torch.bfloat16)
    assert state.conv.shape == (3, 64 + 2 * 2 * 16, 3)
    assert state.conv.dtype == torch.bfloat16
    assert state.ssm.shape == (3, 8, 8, 16)
    assert state.ssm.dtype == torch.float32
    assert state.position == 0


def test_flops():
    block = build("reference", groups=2)
    H, P, N, W, channels, T = 8, 8, 16, 4, 128, 10
    recurrence = T * (2 * H * P * N + H * P * N + 2 * H * P * N)
    assert block.mixer_flops(T) == recurrence + T * 2 * W * channels
    assert block.mixer_flops(T, context=1000) == block.mixer_flops(T)
    assert block.mixer_flops(2 * T) == 2 * block.mixer_flops(T)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(randn(3, T, 32))
    # It counts the projections and the reference's product of state and c, no scans.
    read = T * 2 * H * P * N
    assert counter.get_total_flops() == 3 * (projection_flops(block, T) + read)
    assert forward_flops(block, 3, T) == 3 * (projection_flops(block, T) + block.mixer_flops(T))


def test_final_norm():
    norm = build(norm_eps=1e-3).final_norm()
    assert isinstance(norm, RMSNorm)
    assert norm.eps == 1e-3
    assert norm.weight.shape == (32,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 7}, "expand \\* width = 64 must be a multiple of head_dim = 7"),
        ({"groups": 3}, "the 8 heads .* must be a multiple of groups = 3"),
        ({"conv_width": 5}, "conv_width must be 2, 3 or 4, got 5"),
        ({"d_state": 0}, "must be positive"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max"),
        ({"dt_floor": 0.0}, "0 < dt_floor"),
        ({"decay_min": 17.0}, "0 < decay_min <= decay_max"),
        ({"width": 0}, "width and max_len must be positive"),
    ],
)
def test_a_configuration_that_cannot_be_built_says_why(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)


def test_step_never_falls_back():
    block = build("triton")
    state = block.init_state(1, 2, device="cpu", dtype=torch.float32)
    with pytest.raises(BackendUnavailableError, match="P = 8, N = 16; use 'torch'"):
        block.step(randn(1, 32), state)
