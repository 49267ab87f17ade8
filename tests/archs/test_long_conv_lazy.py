"""Lazy decoding against the direct fold in float64: the operation, then Hyena's blocks."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import archs
from archs.block import decode_bytes, parameter_bytes, state_bytes
from archs.hyena import HyenaConfig, lazy_mean, tile_filter_numbers, tile_flops
from archs.ops import BackendUnavailableError
from archs.ops.long_conv import long_conv_reference, long_conv_step
from archs.ops.long_conv_lazy import (
    DIRECT_TILE,
    add_tiles,
    apply_tile,
    long_conv_lazy_step,
    tile_filter,
    tiles,
)

WIDTH, ROOM = 4, 131  # room: no power of two
LENGTHS = (1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130)
PROMPTS = (0, 1, 5, 64, 100)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def randn(*shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def build(decode="lazy", dtype=torch.float64, **fields):
    """A block whose long convolutions count in what it returns."""
    torch.manual_seed(0)
    fields = {"width": WIDTH, "max_len": ROOM, **fields}
    block = archs.build_block("hyena", decode=decode, **fields)
    with torch.no_grad():
        for name, parameter in block.double().named_parameters():
            # The filter's sines would turn float32's rounding of larger weights into noise.
            if not name.startswith("filter."):
                parameter.add_(0.3 * torch.randn_like(parameter))
        block.filter.output.weight.mul_(3)
    return block.to(dtype)


def relative(got, expected):
    expected = expected.double()
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


def run(block, x, cuts=(), room=ROOM):
    """Outputs and state: passes up to every cut, then steps."""
    state, ys, start = block.init_state(len(x), room, device="cpu", dtype=x.dtype), [], 0
    for cut in cuts:
        if cut > start:
            y, state, _ = block(x[:, start:cut], state)
            ys, start = [*ys, y], cut
    for token in x[:, start:].unbind(1):
        y, state, _ = block.step(token, state)
        ys.append(y.unsqueeze(1))
    return torch.cat(ys, 1), state


def direct_fold(block, x):
    """The definition: direct steps in float64 with the block's parameters."""
    definition = build("direct", order=block.config.order)
    definition.load_state_dict({k: v.double() for k, v in block.state_dict().items()})
    return run(definition, x.double())[0]


# The operation.


@pytest.mark.parametrize("size", [1, 2, DIRECT_TILE // 2, DIRECT_TILE, 2 * DIRECT_TILE, 64])
@pytest.mark.parametrize("short", [False, True])
def test_a_tile_is_its_double_sum(size, short):
    taps, z = randn(3, 2 * size - short * (size // 2)), randn(2, 3, size, seed=2)
    expected = torch.zeros(2, 3, size, dtype=torch.float64)
    for n in range(size):
        for m in range(size):
            if size + n - m < taps.shape[1]:
                expected[..., n] += taps[:, size + n - m] * z[..., m]
    assert relative(apply_tile(z, tile_filter(taps, size)), expected) < 1e-12


def test_every_pair_of_tokens_meets_in_one_tile():
    met = torch.zeros(ROOM, ROOM, dtype=torch.long)
    for end in range(1, ROOM):
        for stop, size in tiles(end - 1, end):
            met[stop : stop + size, stop - size : stop] += 1
    assert torch.equal(met, torch.ones_like(met).tril(-1))


def test_a_prompt_adds_the_tiles_that_reach_past_it():
    assert list(tiles(0, 100)) == [(100, 4), (96, 32), (64, 64)]
    assert list(tiles(96, 100)) == [(100, 4)]
    assert list(tiles(100, 100)) == []


@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.parametrize("split", [0, 1, 37, 64, 100])
def test_pending_after_a_prompt_is_what_later_outputs_owe_to_it(split, leading):
    taps, z = randn(*leading, 3, 128), randn(*leading, 2, 3, 128, seed=2)
    z[..., 100:] = 0
    pending = torch.zeros_like(z)
    filters = partial(tile_filter, taps)
    for start, end in ((0, split), (split, 100)):
        add_tiles(pending, z[..., :end], start, filters, backend="torch")
    assert (pending[..., :100] == 0).all()
    for t in range(100, 128):
        expected = (taps[..., None, :, 1 : t + 1].flip(-1) * z[..., :t]).sum(-1)
        assert relative(pending[..., t], expected) < 1e-12
        # The tokens that follow are zero, but their tiles hold some of the prompt.
        add_tiles(pending, z[..., : t + 1], t, filters, backend="torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_a_step_given_its_sum_is_the_direct_step(dtype, gated):
    u, history, taps = randn(2, 3), randn(2, 3, 9, seed=2), randn(3, 10, seed=3)
    named = {}
    if gated:
        named = {
            "pre_gate": randn(2, 3, seed=4).to(dtype),
            "post_gate": randn(2, 3, seed=5).to(dtype),
            "skip": randn(3, seed=6).to(dtype),
        }
    u, history = u.to(dtype), history.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    taps = taps.to(wide)
    expected_y, expected_z = long_conv_step(u, taps, history, **named)
    owed = (taps[:, :-1] * history.to(wide)).sum(-1)
    y, z = long_conv_lazy_step(u, taps[:, -1], owed, **named)
    assert y.dtype == z.dtype == dtype
    assert torch.equal(z, expected_z)
    assert relative(y, expected_y) < (1e-2 if dtype == torch.bfloat16 else TOLERANCE[dtype])


def test_the_fold_of_lazy_steps_is_the_long_convolution():
    T, pre, post = 75, randn(2, 3, 75, seed=4), randn(2, 3, 75, seed=5)
    u, taps, skip = randn(2, 3, T), randn(3, T, seed=2), randn(3, seed=3)
    expected = long_conv_reference(u, taps, pre_gate=pre, post_gate=post, skip=skip)
    history, pending, ys = torch.zeros_like(u), torch.zeros_like(u), []
    for t in range(T):
        y, history[..., t] = long_conv_lazy_step(
            u[..., t],
            taps[:, 0],
            pending[..., t],
            pre_gate=pre[..., t],
            post_gate=post[..., t],
            skip=skip,
        )
        ys.append(y)
        add_tiles(pending, history[..., : t + 1], t, partial(tile_filter, taps), backend="torch")
    assert relative(torch.stack(ys, -1), expected) < 1e-12


@pytest.mark.parametrize(("start", "end"), [(5, 4), (0, 9)])
def test_histories_that_do_not_fit(start, end):
    with pytest.raises(ValueError, match=f"a history of {end} tokens must be from start = {start}"):
        add_tiles(torch.zeros(1, 1, 8), torch.zeros(1, 1, end), start, dict, backend="torch")


def test_backends_without_tiles():
    pending, history = torch.zeros(1, 1, 8), torch.zeros(1, 1, 4)
    with pytest.raises(BackendUnavailableError, match=r"long_conv_lazy: .* not built yet"):
        add_tiles(pending, history, 0, dict, backend="triton")
    with pytest.raises(ValueError, match="long_conv_lazy: unknown backend 'torhc'"):
        add_tiles(pending, history, 0, dict, backend="torhc")


# The block.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_steps_are_the_direct_fold(length, order, dtype):
    block, x = build(order=order, dtype=dtype), randn(3, length, WIDTH, dtype=dtype)
    with torch.no_grad():
        expected = direct_fold(block, x)
        for room in {ROOM, length}:
            assert relative(run(block, x, room=room)[0], expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_steps_after_a_prompt_are_the_direct_fold(prompt, order, dtype):
    block, x = build(order=order, dtype=dtype), randn(2, ROOM, WIDTH, dtype=dtype)
    with torch.no_grad():
        assert relative(run(block, x, [prompt])[0], direct_fold(block, x)) < TOLERANCE[dtype]


def test_the_past_matters_in_these_tests():
    block, x = build(), randn(1, ROOM, WIDTH)
    with torch.no_grad():
        _, state = run(block, x[:, :-1])
        assert state.pending[..., -1].abs().max() > 0.1
        right = block.step(x[:, -1], state._replace(history=state.history.clone())).x
        state.pending.zero_()
        assert relative(block.step(x[:, -1], state).x, right) > 1e-2


# Pieces of a sequence: how many tokens, and whether one pass reads them.
PIECES = st.lists(st.tuples(st.integers(1, 70), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(pieces=PIECES, order=st.sampled_from([2, 3]), spare=st.integers(0, 40))
def test_any_mixture_of_passes_and_steps(pieces, order, spare):
    total = min(sum(n for n, _ in pieces), ROOM)
    room = min(total + spare, ROOM)
    block, x = build(order=order), randn(2, total, WIDTH)
    with torch.no_grad():
        expected = direct_fold(block, x)
        whole = block(x, block.init_state(2, room, device="cpu", dtype=x.dtype)).state
        state, ys, start = block.init_state(2, room, device="cpu", dtype=x.dtype), [], 0
        for n, in_one_pass in pieces:
            part, start = x[:, start : start + n], start + n
            if in_one_pass and part.shape[1]:
                y, state, _ = block(part, state)
                ys.append(y)
            else:
                for token in part.unbind(1):
                    y, state, _ = block.step(token, state)
                    ys.append(y.unsqueeze(1))
    assert relative(torch.cat(ys, 1), expected) < 1e-12
    assert state.position == whole.position == total
    torch.testing.assert_close(state.pending, whole.pending, rtol=0, atol=1e-11)


@pytest.mark.parametrize("order", [2, 3])
def test_gradients_are_those_of_one_pass(order):
    block, x = build(order=order), randn(2, 77, WIDTH).requires_grad_()
    dy, wanted = randn(2, 77, WIDTH, seed=2), (x, *block.parameters())
    expected = torch.autograd.grad(block(x).x, wanted, dy)
    for cuts in ((), (40,), (13, 14, 70)):
        y, state = run(block, x, cuts, room=90)
        assert state.pending.requires_grad
        for got, want in zip(torch.autograd.grad(y, wanted, dy), expected, strict=True):
            assert relative(got, want) < 1e-10


@pytest.mark.parametrize("frozen", [False, True])
def test_a_recorded_state_is_left_alone_and_another_written_in_place(frozen):
    block, x = build(), randn(1, 12, WIDTH)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not frozen or name.startswith("filter."))
    with torch.no_grad():
        _, state = run(block, x[:, :7], [6])
        after = block.step(x[:, 7], state).state
    assert after.pending.data_ptr() == state.pending.data_ptr()
    recorded = block.step(x[:, 8], after).state
    assert recorded.pending.requires_grad
    for state, recorded_again in ((after, True), (recorded, False)):
        before = state.pending.detach().clone()
        with torch.set_grad_enabled(recorded_again):
            following = block(x[:, state.position :], state).state
        assert torch.equal(state.pending, before)
        assert following.pending.requires_grad == recorded_again


def test_tile_filters_are_formed_once(monkeypatch):
    block, x, formed = build(), randn(1, 100, WIDTH), []

    def counting(taps, size):
        formed.append(size)
        return tile_filter(taps, size)

    monkeypatch.setattr(archs.hyena, "tile_filter", counting)
    with torch.no_grad():
        run(block, x)
        run(block, x, [50])
    assert sorted(formed) == [1, 2, 4, 8, 16, 32, 64]


def test_decoding_follows_changed_parameters():
    block, other, x = build(), build(order=2), randn(1, 70, WIDTH)

    def is_right():
        with torch.no_grad():
            return relative(run(block, x)[0], direct_fold(block, x)) < 1e-12

    assert is_right()
    for name, parameter in block.filter.named_parameters():
        with torch.no_grad():
            parameter.mul_(1.3)
        assert is_right(), name
    twin = copy.deepcopy(block)
    with torch.no_grad():
        twin.filter.output.weight.mul_(3)
        assert relative(run(twin, x)[0], direct_fold(twin, x)) < 1e-12
    assert is_right()
    block.load_state_dict(other.state_dict())
    assert is_right()
    block.float().double()
    assert is_right()
    learner = torch.optim.AdamW(block.filter.parameters(), lr=0.01, fused=True)
    block(x).x.square().sum().backward()
    learner.step()
    assert is_right()


def test_a_block_made_and_run_in_inference_mode():
    with torch.inference_mode():
        block, x = build(), randn(1, 70, WIDTH)
        assert relative(run(block, x)[0], direct_fold(block, x)) < 1e-12
        block.filter.output.weight.mul_(2)
        assert relative(run(block, x, [33])[0], direct_fold(block, x)) < 1e-12


def test_reduced_types():
    block, x = build(dtype=torch.bfloat16), randn(2, 100, WIDTH, dtype=torch.bfloat16)
    with torch.no_grad():
        y, state = run(block, x, [50])
        expected = direct_fold(block, x)
    assert y.dtype == state.history.dtype == torch.bfloat16
    assert state.pending.dtype == torch.float32
    assert relative(y, expected) < 3e-2


def test_only_lazy_states_have_pending_and_their_bytes_count():
    for order in (2, 3):
        lazy, direct = build(order=order), build("direct", order=order)
        state = lazy.init_state(2, 50, device="cpu", dtype=torch.bfloat16)
        assert state.pending.shape == state.history.shape == (order - 1, 2, WIDTH, 50)
        assert direct.init_state(2, 50, device="cpu", dtype=torch.bfloat16).pending is None
        more = state_bytes(lazy, 2, 50, torch.bfloat16) - state_bytes(direct, 2, 50, torch.bfloat16)
        assert more == (order - 1) * 2 * WIDTH * 50 * 4


def test_decode_is_checked():
    with pytest.raises(ValueError, match="decode must be 'direct' or 'lazy', got 'eager'"):
        HyenaConfig(width=8, decode="eager")


def test_means_are_those_of_all_tokens():
    """Of a tile a token at all positions up to a power of two."""
    T = 1024
    for cost in (tile_flops, tile_filter_numbers, lambda size: size):
        total = sum(cost((t + 1) & -(t + 1)) for t in range(T - 1)) / T
        assert lazy_mean(T - 2, cost) == pytest.approx(total, abs=1)


def test_counts_of_a_lazy_token_grow_slower():
    lazy, direct = (build(mode, max_len=2**15) for mode in ("lazy", "direct"))
    assert lazy.mixer_flops(100) == direct.mixer_flops(100)
    flops = [lazy.mixer_flops(1, 2**k) for k in (10, 12, 14)]
    moved = [decode_bytes(lazy, 1, 2**k, torch.float32) for k in (10, 12, 14)]
    for counts in (flops, moved):
        assert counts[0] < counts[1] < counts[2] < 1.6 * counts[1]
    assert direct.mixer_flops(1, 2**14) > 20 * flops[2]
    assert decode_bytes(direct, 1, 2**14, torch.float32) > 20 * moved[2]


@pytest.mark.parametrize("order", [2, 3])
def test_bytes_of_a_lazy_token_in_full(order):
    block, channels = build(order=order), (order - 1) * WIDTH
    outside = parameter_bytes(block) - parameter_bytes(block.filter)
    # Tiles of 1, 2, 4 and 8 tokens: 1/2 + 4/4 + 16/8 + 64/16 numbers of the filter, 4/2 tokens.
    assert block.step_weight_bytes(14) == outside + channels * (1 + 8) * 8
    tail = (order + 1) * WIDTH * 2 * 2
    assert block.step_state_bytes(5, 14, torch.bfloat16) == 5 * (tail + channels * 3 * (2 + 4))
