import math

import pytest
import torch
from rwkv7_hf.configuration_rwkv7 import RWKV7Config as TheirConfig
from rwkv7_hf.modeling_rwkv7 import RWKV7Model
from torch import Tensor, nn

from archs.block import parameter_bytes
from archs.rwkv7 import RWKV7Block, RWKV7Config, RWKV7State

D, N, H = 64, 16, 4
RANKS = {"decay_rank": 8, "rate_rank": 6, "value_rank": 4, "gate_rank": 12}
# Kernels run on the CPU only in the interpreter, which is not chosen where there is a GPU.
BACKENDS = ("reference", "torch", *(() if torch.cuda.is_available() else ("triton",)))

# Their name of each parameter of ours, in a layer; they keep no others.
THEIR_NAMES = {
    "input_norm": "pre_norm",
    "time_norm": "attn_norm",
    "channel_norm": "ffn_norm",
    "time_mix.mix_r": "attn.x_r",
    "time_mix.mix_w": "attn.x_w",
    "time_mix.mix_k": "attn.x_k",
    "time_mix.mix_v": "attn.x_v",
    "time_mix.mix_a": "attn.x_a",
    "time_mix.mix_g": "attn.x_g",
    "time_mix.receptance": "attn.r_proj",
    "time_mix.key": "attn.k_proj",
    "time_mix.value": "attn.v_proj",
    "time_mix.output": "attn.o_proj",
    "time_mix.decay.down": "attn.w_lora.lora.0",
    "time_mix.decay.up": "attn.w_lora.lora.2",
    "time_mix.rate.down": "attn.a_lora.lora.0",
    "time_mix.rate.up": "attn.a_lora.lora.2",
    "time_mix.gate.down": "attn.g_lora.lora.0",
    "time_mix.gate.up": "attn.g_lora.lora.2",
    "time_mix.value_residual.down": "attn.v_lora.lora.0",
    "time_mix.value_residual.up": "attn.v_lora.lora.2",
    "time_mix.removal_scale": "attn.k_k",
    "time_mix.rate_scale": "attn.k_a",
    "time_mix.bonus": "attn.r_k",
    "time_mix.norm": "attn.g_norm",
    "channel_mix.mix": "ffn.x_k",
    "channel_mix.key": "ffn.key",
    "channel_mix.value": "ffn.value",
}


def config(**fields) -> RWKV7Config:
    return RWKV7Config(**{"width": D, "head_dim": N, **RANKS, **fields})


def randomise(module: nn.Module, seed: int = 7) -> None:
    """Move every parameter off its initial value, so that no path is dead or trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise.to(parameter.dtype))


def build(depth: int = 1, layer_index: int = 0, backend: str = "torch", **fields) -> RWKV7Block:
    torch.manual_seed(0)
    block = RWKV7Block(config(**fields), layer_index=layer_index, depth=depth, backend=backend)
    randomise(block)
    return block


def tokens(length: int = 70, dtype=torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, D, generator=generator, dtype=torch.float64).to(dtype)


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


# Parity with rwkv7-hf: the same weights, float32, 1e-5.


def theirs() -> RWKV7Model:
    torch.manual_seed(0)
    model = RWKV7Model(
        TheirConfig(
            vocab_size=11,
            hidden_size=D,
            num_hidden_layers=2,
            head_dim=N,
            decay_low_rank_dim=RANKS["decay_rank"],
            a_low_rank_dim=RANKS["rate_rank"],
            v_low_rank_dim=RANKS["value_rank"],
            gate_low_rank_dim=RANKS["gate_rank"],
        )
    ).eval()
    randomise(model)
    return model


def ours(model: RWKV7Model, backend: str) -> tuple[list[RWKV7Block], nn.Module]:
    """Our blocks and final norm with the weights of `model`, every one of which is used."""
    blocks = [
        RWKV7Block(config(), layer_index=index, depth=2, backend=backend) for index in range(2)
    ]
    weights = dict(model.state_dict())
    for index, block in enumerate(blocks):
        for name, parameter in block.state_dict().items():
            module, _, leaf = name.rpartition(".")
            their_name = THEIR_NAMES.get(name) or f"{THEIR_NAMES[module]}.{leaf}"
            weight = weights.pop(f"layers.{index}.{their_name}")
            parameter.copy_(weight.reshape(parameter.shape))
    norm = blocks[-1].final_norm()
    norm.load_state_dict({leaf: weights.pop(f"norm.{leaf}") for leaf in ("weight", "bias")})
    assert list(weights) == ["embeddings.weight"]
    return blocks, norm


def gradient(y: Tensor, x: Tensor) -> Tensor:
    (dx,) = torch.autograd.grad((y * y.detach().cos()).sum(), x, retain_graph=True)
    return dx


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", [0, 1])
def test_time_mix_equals_rwkv7_hf(layer, backend):
    model = theirs()
    mix, block = model.layers[layer].attn, ours(model, backend)[0][layer]
    x, v_first = tokens().requires_grad_(), tokens(seed=2).requires_grad_()
    before, start = tokens(seed=3)[:, 0], torch.randn(2, H, N, N)
    mask = torch.ones(2, x.shape[1], dtype=torch.bool)
    expected, expected_wkv, _, expected_v = mix(x, start, before, v_first, mask)

    previous = torch.cat((before[:, None], x[:, :-1]), dim=1)
    projected, v = block.time_mix.project(x, previous, v_first if layer else None)
    y, wkv = block._recurrence(projected, start)
    got = block.time_mix.finish(y, projected)
    assert relative(got, expected) <= 1e-5
    assert relative(wkv, expected_wkv) <= 1e-5
    assert relative(v, expected_v) <= 1e-5
    assert relative(gradient(got, x), gradient(expected, x)) <= 1e-5
    if layer:
        assert relative(gradient(got, v_first), gradient(expected, v_first)) <= 1e-5


@pytest.mark.parametrize("layer", [0, 1])
def test_channel_mix_equals_rwkv7_hf(layer):
    model = theirs()
    mix, block = model.layers[layer].ffn, ours(model, "torch")[0][layer]
    x, before = tokens().requires_grad_(), tokens(seed=3)[:, 0]
    expected, _ = mix(x, before, torch.ones(2, x.shape[1], dtype=torch.bool))
    got = block.channel_mix(x, torch.cat((before[:, None], x[:, :-1]), dim=1))
    assert relative(got, expected) <= 1e-5
    assert relative(gradient(got, x), gradient(expected, x)) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_layer_stack_equals_rwkv7_hf(backend):
    model = theirs()
    blocks, norm = ours(model, backend)
    x = tokens().requires_grad_()
    expected = model(inputs_embeds=x, use_cache=False).last_hidden_state
    first = blocks[0](x)
    got = norm(blocks[1](first.x, None, first.carry).x)
    assert relative(got, expected) <= 1e-5
    assert relative(gradient(got, x), gradient(expected, x)) <= 1e-5
    # The value residual is a real part of that.
    without = norm(blocks[1](first.x, None, {"rwkv7": torch.zeros_like(x)}).x)
    assert relative(without, expected) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_equals_rwkv7_hf(backend):
    model = theirs()
    blocks, norm = ours(model, backend)
    x = tokens(12)
    states = [b.init_state(2, 12, device="cpu", dtype=torch.float32) for b in blocks]
    cache = None
    with torch.no_grad():
        for t in range(12):
            out = model(inputs_embeds=x[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            y, carry = x[:, t], None
            for index, block in enumerate(blocks):
                y, states[index], carry = block.step(y, states[index], carry)
            assert relative(norm(y), out.last_hidden_state[:, 0]) <= 1e-5
    for index, state in enumerate(states):
        assert relative(state.wkv, cache.recurrent_state[index]) <= 1e-5
        assert relative(state.time_shift, cache.attention_shift[index]) <= 1e-5
        assert relative(state.channel_shift, cache.ffn_shift[index]) <= 1e-5


# The value residual and the place in the stack.


def test_first_block_puts_its_values_into_the_carry():
    block, x = build(), tokens(9)
    carry = block(x).carry
    state = block.init_state(2, 9, device="cpu", dtype=x.dtype)
    stepped = block.step(x[:, 0], state).carry
    assert carry["rwkv7"].shape == (2, 9, D)
    assert stepped["rwkv7"].shape == (2, D)
    assert relative(stepped["rwkv7"], carry["rwkv7"][:, 0]) < 1e-6


def test_later_block_reads_the_carry_and_hands_it_on():
    block, x = build(depth=3, layer_index=2), tokens(9)
    values = tokens(9, seed=5).requires_grad_()
    carry = {"rwkv7": values, "other": torch.ones(1)}
    out = block(x, None, carry)
    assert out.carry["rwkv7"] is values
    assert out.carry["other"] is carry["other"]
    (dvalues,) = torch.autograd.grad(out.x.sum(), values)
    assert dvalues.abs().amax(dim=(0, 2)).min() > 1e-4  # every token's


@pytest.mark.parametrize("carry", [None, {}, {"mamba2": torch.ones(1)}])
def test_a_missing_carry_is_one_clear_line(carry):
    block, x = build(depth=2, layer_index=1), tokens(3)
    with pytest.raises(ValueError, match=r"^layer 1 needs .* pass on the carry .*$"):
        block(x, None, carry)
    with pytest.raises(ValueError, match="pass on the carry"):
        block.step(x[:, 0], block.init_state(2, 3, device="cpu", dtype=x.dtype), carry)


def test_kind_index_decides_on_the_value_residual_and_layer_index_on_the_norm():
    def has(**place):
        block = RWKV7Block(config(), depth=4, **place)
        names = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
        return "time_mix.value_residual.up" in names, "input_norm" in names

    assert has() == (False, True)
    assert has(layer_index=2, kind_index=0) == (False, False)
    assert has(layer_index=2, kind_index=1) == (True, False)
    assert has(layer_index=2) == (True, False)


# Initialisation, against numbers worked out by hand from the official formulas.


def test_initial_mixes_decays_and_scales():
    block = RWKV7Block(config(), layer_index=1, depth=3)
    mix, i, n = block.time_mix, 25, 9  # channel 25 is channel 9 of head 1
    ratio, zigzag, linear = 25 / 64, ((9 - 7.5) / 7.5) ** 2, 25 / 63 - 0.5
    expected = {
        mix.mix_r: 1 - ratio ** (0.2 * 2 / 3),
        mix.mix_w: 1 - ratio ** (0.9 * 2 / 3),
        mix.mix_k: 1 - ratio ** (0.7 * 2 / 3),
        mix.mix_v: 1 - ratio ** (0.7 * 2 / 3),
        mix.mix_a: 1 - ratio ** (0.9 * 2 / 3),
        mix.mix_g: 1 - ratio ** (0.2 * 2 / 3),
        block.channel_mix.mix: 1 - ratio ** ((2 / 3) ** 4),
        mix.decay.up.bias: -6 + 6 * (25 / 63) ** (1 + 0.5**0.3) + 0.5 + 2.5 * zigzag,
        mix.rate.up.bias: -0.19 + 0.3 * zigzag + 0.4 * linear,
        mix.value_residual.up.bias: 0.73 - 0.4 * linear,
        mix.removal_scale: 0.71 - 0.1 * linear,
        mix.rate_scale: 1.02,
        mix.bonus: -0.04,
        mix.norm.weight: (2 / 3) ** 0.7,
    }
    assert n == i % N
    for parameter, value in expected.items():
        assert parameter.shape == (D,)
        assert parameter[i].item() == pytest.approx(value, abs=1e-6)


def test_initial_matrices():
    block = RWKV7Block(config(), layer_index=1, depth=3)
    mix = block.time_mix

    def gain(weight: Tensor) -> float:
        """The common singular value."""
        values = torch.linalg.svdvals(weight.double())
        assert values.max() - values.min() < 1e-5
        return values.mean().item()

    for zero in (mix.output, block.channel_mix.value, mix.decay.down, mix.rate.down):
        assert not zero.weight.any()
    for zero in (mix.gate.down, mix.value_residual.down):
        assert not zero.weight.any()
    assert gain(mix.receptance.weight) == pytest.approx(1.0, abs=1e-5)
    assert gain(mix.value.weight) == pytest.approx(1.0, abs=1e-5)
    assert gain(mix.key.weight) == pytest.approx(0.1, abs=1e-5)
    assert gain(block.channel_mix.key.weight) == pytest.approx(1.0, abs=1e-5)
    for low_rank in (mix.decay, mix.rate, mix.gate, mix.value_residual):
        assert gain(low_rank.up.weight) == pytest.approx(0.1, abs=1e-5)
    wide = RWKV7Block(config(gate_rank=4 * D))
    assert gain(wide.time_mix.gate.up.weight) == pytest.approx(0.2, abs=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 12])
def test_every_depth_starts_finite_as_the_identity(depth):
    for layer_index in range(depth):
        block = RWKV7Block(config(), layer_index=layer_index, depth=depth)
        assert all(p.isfinite().all() for p in block.parameters())
        x = tokens(5)
        expected = nn.functional.layer_norm(x, (D,)) if layer_index == 0 else x
        assert torch.equal(block(x, None, {"rwkv7": x}).x, expected)


@pytest.mark.parametrize(("vocab", "gain"), [(256, 1.0), (64, 0.5), (48, 0.5)])
def test_initial_ends(vocab, gain):
    embedding, head = nn.Embedding(vocab, D), nn.Linear(D, vocab, bias=False)
    build().init_ends(embedding, head)
    assert 0.9e-4 < embedding.weight.abs().max() <= 1e-4
    assert torch.linalg.svdvals(head.weight).mean().item() == pytest.approx(gain, abs=1e-5)


# Sizes and accounting.


@pytest.mark.parametrize(
    ("width", "decay", "value", "gate"),
    [(64, 32, 32, 32), (256, 32, 32, 64), (768, 64, 32, 128), (2048, 128, 64, 224)],
)
def test_default_ranks_follow_the_official_formulas(width, decay, value, gate):
    with torch.device("meta"):
        mix = RWKV7Block(RWKV7Config(width=width), layer_index=1, depth=2).time_mix
    got = [low.down.out_features for low in (mix.decay, mix.rate, mix.value_residual, mix.gate)]
    assert got == [decay, decay, value, gate]


def test_mixer_flops_are_nine_state_sizes_a_token():
    block = build()
    assert block.mixer_flops(10) == 10 * 9 * H * N * N
    assert block.mixer_flops(10, context=500) == block.mixer_flops(10)


def test_parameters_of_a_large_block():
    # 12 D^2 in the large matrices; ranks 128 + 128 + 224 twice; vectors.
    with torch.device("meta"):
        block = RWKV7Block(RWKV7Config(width=2048))
    vectors = 6 + 2 + 3 + 2 + 1 + 3 * 2  # mixes, w0 and a0, scales and bonus, norms
    expected = 12 * 2048**2 + 2 * 2048 * (128 + 128 + 224) + vectors * 2048
    assert parameter_bytes(block) == 4 * expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 60}, "width = 60 must be a multiple of head_dim = 16"),
        ({"head_dim": 1}, "at least 2"),
        ({"head_dim": 0}, "at least 2"),
        ({"gate_rank": 0}, "gate_rank must be positive"),
        ({"mlp_width": -1}, "mlp_width must be positive"),
    ],
)
def test_configuration_errors_name_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


# Numerics.


def test_bfloat16_decays_are_formed_in_float32():
    block = build().bfloat16()
    x = tokens(3, torch.bfloat16)
    projected, _ = block.time_mix.project(x, x, None)
    assert projected.decay_logits.dtype == torch.float32
    assert projected.kappa.dtype == torch.bfloat16


def test_a_zero_key_gives_a_zero_removal_key():
    block = build().half()
    with torch.no_grad():
        block.time_mix.key.weight.zero_()
    x = tokens(3, torch.float16)
    projected, _ = block.time_mix.project(x, x, None)
    assert not projected.kappa.any()
    assert block(x).x.isfinite().all()


def test_state_does_not_keep_the_sequence_alive():
    block, x = build(), tokens(50)
    with torch.no_grad():
        _, state, _ = block(x, block.init_state(2, 50, device="cpu", dtype=x.dtype))
    assert isinstance(state, RWKV7State)
    for part in (state.time_shift, state.channel_shift, state.wkv):
        assert part.untyped_storage().nbytes() == math.prod(part.shape) * 4
