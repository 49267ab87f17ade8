"""The Transformer block: parity with `transformers`' Llama layer, the cache, the closed forms."""

import cmath
import copy
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from archs.block import parameter_bytes, state_bytes
from archs.ops.attention import attention_reference
from archs.transformer import TransformerBlock, TransformerConfig, rotate, rotations


def make_block(dtype=torch.float64, depth=1, backend="torch", **options):
    torch.manual_seed(0)
    config = TransformerConfig(**{"width": 32, "head_dim": 8, "mlp_width": 48, **options})
    block = TransformerBlock(config, depth=depth, backend=backend)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            # Far from the initialisation, so that no part of the block is a small correction.
            parameter.normal_(std=0.3)
            if "norm" in name:
                parameter += 1
    return block.to(dtype)


def tokens(T, width=32, B=2, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, width, generator=generator, dtype=torch.float64).to(dtype)


def deviation(got, want):
    """max|got - want| / max|want|."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max())


def llama_layer(block, implementation):
    """A Llama layer of `transformers` with the block's weights, as a function of x and a mask."""
    config = block.config
    llama = LlamaConfig(
        hidden_size=config.width,
        intermediate_size=config.hidden_width,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_value_heads,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_base,
        max_position_embeddings=4096,
    )
    llama._attn_implementation = implementation
    layer, rotary = LlamaDecoderLayer(llama, layer_idx=0), LlamaRotaryEmbedding(llama)
    names = {
        "attention_norm": "input_layernorm",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    weights = block.state_dict()
    assert len(weights) == len(names)
    layer.load_state_dict(
        {f"{theirs}.weight": weights[f"{ours}.weight"] for ours, theirs in names.items()}
    )

    def run(x, mask):
        position = torch.arange(x.shape[1])[None]
        return layer(x, attention_mask=mask, position_embeddings=rotary(x, position))

    return run


def dense_mask(T, window, dtype=torch.float32):
    """0 where query t may read key s, else the type's lowest number; (1, 1, T, T)."""
    age = torch.arange(T)[:, None] - torch.arange(T)
    visible = (age >= 0) & (age < (window or T))
    return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("T", "kv_heads", "window", "rope_base"),
    [
        (100, None, None, 10000.0),
        (100, 2, None, 10000.0),
        (100, 1, None, 500000.0),
        (150, 2, 40, 10000.0),  # at T = 300 its float32 angles already err by 1e-5
    ],
)
def test_equals_the_llama_layer_of_transformers(
    T, kv_heads, window, rope_base, backend, implementation
):
    block = make_block(
        torch.float32,
        width=64,
        head_dim=16,
        mlp_width=96,
        kv_heads=kv_heads,
        window=window,
        rope_base=rope_base,
        backend=backend,
    )
    llama = llama_layer(block, implementation)
    ours, theirs = (tokens(T, 64, dtype=torch.float32).requires_grad_() for _ in range(2))
    weight = tokens(T, 64, dtype=torch.float32, seed=2)
    got, want = block(ours).x, llama(theirs, dense_mask(T, window))
    assert deviation(got, want) <= 1e-5
    (got_gradient,) = torch.autograd.grad(got, ours, weight)
    (want_gradient,) = torch.autograd.grad(want, theirs, weight)
    assert deviation(got_gradient, want_gradient) <= 1e-5


def by_hand(block, x):
    """The block written out again: complex rotations, repeated heads, one dense mask."""
    config, weights = block.config, block.state_dict()
    B, T, D = x.shape
    H, K = config.heads, config.head_dim

    def norm(x, name):
        mean_square = (x * x).sum(-1, keepdim=True) / D
        return weights[f"{name}.weight"] * x / (mean_square + config.norm_eps).sqrt()

    def heads(x, name):
        made = (x @ weights[f"{name}.weight"].T).view(B, T, -1, K)
        return made.repeat_interleave(H // made.shape[2], 2)

    def turn(x):
        angle = torch.arange(T)[:, None] * config.rope_base ** (-2 * torch.arange(K // 2) / K)
        z = torch.complex(x[..., : K // 2], x[..., K // 2 :])
        z = z * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([z.real, z.imag], -1)

    normed = norm(x, "attention_norm")
    q, k, v = turn(heads(normed, "query")), turn(heads(normed, "key")), heads(normed, "value")
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(K)
    scores = scores + dense_mask(T, config.window, x.dtype)
    y = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v).reshape(B, T, D)
    x = x + y @ weights["output.weight"].T
    normed = norm(x, "mlp_norm")
    gate, up = normed @ weights["mlp.gate.weight"].T, normed @ weights["mlp.up.weight"].T
    return x + (gate * gate.sigmoid() * up) @ weights["mlp.down.weight"].T


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("T", "kv_heads", "window"),
    [(1, None, None), (65, 2, None), (65, 1, 1), (65, 2, 16), (600, 2, 40), (65, 4, 65)],
)
def test_equals_the_block_written_by_hand(T, kv_heads, window, backend):
    torch.set_default_dtype(torch.float64)
    try:
        block = make_block(kv_heads=kv_heads, window=window, backend=backend)
        x = tokens(T).requires_grad_()
        got, want = block(x).x, by_hand(block, x)
        assert deviation(got, want) <= 1e-10
        weight = tokens(T, seed=2)
        (got_gradient,) = torch.autograd.grad(got, x, weight)
        (want_gradient,) = torch.autograd.grad(want, x, weight)
        assert deviation(got_gradient, want_gradient) <= 1e-10
    finally:
        torch.set_default_dtype(torch.float32)


# window and max_len of the state: none, a ring that turns, a ring as long as the text, a window
# that the cache never fills, a ring of one slot.
CACHES = [(None, 65), (None, 90), (16, 65), (64, 65), (65, 65), (100, 65), (1, 65)]


@pytest.mark.parametrize(("window", "max_len"), CACHES)
@pytest.mark.parametrize("recorded", [False, True])
def test_state_handed_over_at_every_split(window, max_len, recorded):
    block, x = make_block(kv_heads=2, window=window), tokens(65)
    with torch.set_grad_enabled(recorded):
        whole = block(x).x
        for split in range(1, 65):
            state = block.init_state(2, max_len, device="cpu", dtype=torch.float64)
            first = block(x[:, :split], state)
            second = block(x[:, split:], first.state)
            assert deviation(torch.cat([first.x, second.x], 1), whole) <= 1e-10
            assert second.state.position == 65


@pytest.mark.parametrize(("window", "max_len"), CACHES)
@pytest.mark.parametrize("recorded", [False, True])
def test_forward_is_the_fold_of_steps(window, max_len, recorded):
    block, x = make_block(kv_heads=2, window=window), tokens(65)
    with torch.set_grad_enabled(recorded):
        state, outputs = block.init_state(2, max_len, device="cpu", dtype=torch.float64), []
        for t in range(65):
            y, state, _ = block.step(x[:, t], state)
            outputs.append(y)
        assert deviation(torch.stack(outputs, 1), block(x).x) <= 1e-10


@pytest.mark.parametrize("chunks", [[7, 30, 1, 1, 20, 6], [1, 1, 17, 16, 15, 15]])
@pytest.mark.parametrize("window", [None, 16])
def test_chunks_longer_and_shorter_than_the_ring(window, chunks):
    block, x = make_block(window=window), tokens(65)
    state = block.init_state(2, 65, device="cpu", dtype=torch.float64)
    outputs = []
    with torch.no_grad():
        for part in x.split(chunks, 1):
            y, state, _ = block(part, state)
            outputs.append(y)
    assert deviation(torch.cat(outputs, 1), block(x).x) <= 1e-10


@pytest.mark.parametrize("window", [None, 16, 5])
def test_gradients_flow_through_the_cache(window):
    block = make_block(kv_heads=2, window=window)
    x, weight = tokens(30).requires_grad_(), tokens(30, seed=2)
    parameters = [x, *block.parameters()]
    want = torch.autograd.grad(block(x).x, parameters, weight)
    state, outputs = block.init_state(2, 30, device="cpu", dtype=torch.float64), []
    for part in x.split([3, 1, 13, 1, 12], 1):
        y, state, _ = block(part, state)
        outputs.append(y)
    got = torch.autograd.grad(torch.cat(outputs, 1), parameters, weight)
    for a, b in zip(got, want, strict=True):
        assert deviation(a, b) <= 1e-10


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("T", [1, 4, 12])
def test_cache_is_written_in_place_only_where_no_gradient_is_recorded(T, window):
    block = make_block(window=window)
    with torch.no_grad():
        prompt = block(tokens(5), block.init_state(2, 20, device="cpu", dtype=torch.float64)).state
        after = block(tokens(T), prompt).state
    assert after.keys.data_ptr() == prompt.keys.data_ptr()
    assert after.values.data_ptr() == prompt.values.data_ptr()

    keys, values = after.keys.clone(), after.values.clone()
    recorded = block(tokens(2), after).state
    assert torch.equal(after.keys, keys)
    assert torch.equal(after.values, values)
    assert recorded.keys.requires_grad

    # A cache inside a recorded graph stays whole when decoding goes on without gradients.
    keys = recorded.keys.detach().clone()
    with torch.no_grad():
        block.step(tokens(1)[:, 0], recorded)
    assert torch.equal(recorded.keys, keys)


def test_frozen_keys_under_a_recorded_query_are_not_overwritten():
    block = make_block()
    block.requires_grad_(False)
    block.query.requires_grad_(True)
    state = block.init_state(2, 9, device="cpu", dtype=torch.float64)
    y, state, _ = block(tokens(4), state)
    z, _, _ = block.step(tokens(1)[:, 0], state)
    (y.sum() + z.sum()).backward()
    assert block.query.weight.grad.abs().max() > 0


@pytest.mark.parametrize("window", [None, 4])
def test_an_old_state_stepped_again_overwrites_the_same_slot(window):
    block, x = make_block(window=window), tokens(9)
    with torch.no_grad():
        state = block(x[:, :6], block.init_state(2, 9, device="cpu", dtype=torch.float64)).state
        once = block.step(x[:, 6], state).x
        block.step(x[:, 7], state)
        assert torch.equal(block.step(x[:, 6], state).x, once)


@pytest.mark.parametrize(("window", "max_len"), [(None, 8), (30, 8)])
def test_a_full_cache_says_so(window, max_len):
    block = make_block(window=window)
    state = block.init_state(2, max_len, device="cpu", dtype=torch.float64)
    state = block(tokens(7), state).state
    state = block.step(tokens(1)[:, 0], state).state
    with pytest.raises(ValueError, match=r"room for 8 tokens, not 9: .*max_len of at least 9"):
        block.step(tokens(1)[:, 0], state)
    with pytest.raises(ValueError, match="room for 8 tokens, not 11"):
        block(tokens(3), state)


def test_a_window_bounds_the_state_and_never_fills_up():
    block = make_block(window=8, kv_heads=2)
    assert state_bytes(block, 3, 8, torch.float32) == 2 * 3 * 8 * 2 * 8 * 4
    assert state_bytes(block, 3, 10**9, torch.float32) == 2 * 3 * 8 * 2 * 8 * 4
    assert state_bytes(block, 3, 5, torch.float32) == 2 * 3 * 5 * 2 * 8 * 4
    unbounded = make_block(kv_heads=2)
    assert state_bytes(unbounded, 3, 1000, torch.bfloat16) == 2 * 3 * 1000 * 2 * 8 * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 8])
def test_reduced_types_stay(window, dtype):
    block = make_block(dtype, window=window)
    x = tokens(20, dtype=dtype)
    state = block.init_state(2, 20, device="cpu", dtype=dtype)
    first = block(x[:, :12], state)
    second = block.step(x[:, 12], first.state)
    assert first.x.dtype == second.x.dtype == second.state.keys.dtype == dtype
    exact = copy.deepcopy(block).double()(x.double()).x
    limit = 4 * torch.finfo(dtype).eps  # each of nine products and sums rounds to half of one
    assert deviation(torch.cat([first.x, second.x[:, None]], 1), exact[:, :13]) <= limit
    assert deviation(block(x).x, exact) <= limit


def test_rotation_sees_distances_only():
    q, k = tokens(2, 8, dtype=torch.float64).view(2, 2, 1, 8)

    def score(q_position, k_position):
        turned_q = rotate(q[None, :1], *rotations(q_position, q[None, :1], 10000.0))
        turned_k = rotate(k[None, :1], *rotations(k_position, k[None, :1], 10000.0))
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(9, 4), score(70005, 70000), rtol=0, atol=1e-9)
    torch.testing.assert_close(score(0, 0), (q[0] * k[0]).sum(), rtol=0, atol=1e-12)
    assert abs(float(score(9, 4) - score(4, 9))) > 1e-3


def test_rotation_at_long_positions_is_exact_in_float32():
    x = tokens(1, 8, B=1, dtype=torch.float32)[:, :, None]
    got = rotate(x, *rotations(1_000_000, x, 10000.0)).flatten().tolist()
    plain = x.flatten().tolist()
    for i in range(4):
        turned = complex(plain[i], plain[i + 4]) * cmath.exp(1e6j * 10000.0 ** (-2 * i / 8))
        assert complex(got[i], got[i + 4]) == pytest.approx(turned, abs=1e-6)


def test_positions_do_not_depend_on_max_len():
    x = tokens(20)
    assert torch.equal(make_block(max_len=20)(x).x, make_block(max_len=4096)(x).x)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize(("new_tokens", "context"), [(1, 0), (7, 0), (1, 20), (9, 2), (12, 30)])
def test_mixer_flops_count_the_pairs_read(new_tokens, context, window):
    block = make_block(window=window, kv_heads=2)
    pairs = sum(
        1
        for q in range(context, context + new_tokens)
        for k in range(q + 1)
        if window is None or k > q - window
    )
    assert block.mixer_flops(new_tokens, context) == 4 * 32 * pairs


@pytest.mark.parametrize(("T", "context"), [(13, 1), (5, 8)])
def test_mixer_flops_equal_the_matmuls_of_the_reference(T, context):
    # From the second token on: einsum multiplies a single key without a matmul.
    block = make_block()
    q, k = torch.zeros(1, T, 4, 8), torch.zeros(1, T + context, 4, 8)
    with FlopCounterMode(display=False) as counter:
        attention_reference(q, k, k)
    assert counter.get_total_flops() == block.mixer_flops(T, context)


def test_projections_are_all_the_matrices_of_a_llama_layer():
    block = make_block(kv_heads=2)
    shapes = {
        name: tuple(p.shape) for name, p in block.named_parameters() if name.endswith("weight")
    }
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    assert sorted(matrices) == sorted(
        [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    )
    assert len(list(block.projections())) == 7
    assert parameter_bytes(block) == 8 * (sum(a * b for a, b in matrices) + 2 * 32)


def test_initialisation():
    torch.manual_seed(0)
    block = TransformerBlock(TransformerConfig(width=256), depth=8)
    into_the_stream = (block.output, block.mlp.down)
    for layer in block.projections():
        std = 0.02 / 4 if layer in into_the_stream else 0.02  # sqrt(2 * 8) = 4
        assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.02)
        assert float(layer.weight.detach().mean()) == pytest.approx(0, abs=std / 50)
        assert layer.bias is None


def test_default_mlp_width_is_llamas():
    assert TransformerConfig(width=4096).hidden_width == 11008  # Llama 2 7B
    assert TransformerConfig(width=5120).hidden_width == 13824  # Llama 2 13B
    assert TransformerConfig(width=128).hidden_width == 512
    assert TransformerConfig(width=128, mlp_width=300).hidden_width == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100}, "width must be a multiple of head_dim, got 100 and 64"),
        ({"width": 63, "head_dim": 63}, "head_dim must be even"),
        ({"width": 64, "head_dim": 0}, "head_dim must be even"),
        ({"width": 256, "kv_heads": 3}, r"kv_heads must divide the 4 heads"),
        ({"width": 256, "kv_heads": 0}, r"kv_heads must divide the 4 heads"),
        ({"width": 64, "window": 0}, "window must be at least 1"),
        ({"width": 64, "mlp_width": 0}, "mlp_width must be at least 1"),
        ({"width": 64, "rope_base": 0.0}, "rope_base must be positive"),
        ({"width": 0}, "width and max_len must be positive"),
    ],
)
def test_wrong_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**options)
