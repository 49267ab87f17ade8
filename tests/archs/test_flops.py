"""The closed forms beside PyTorch's own counter, where that counts: matrix products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import archs
from archs.block import decode_bytes, forward_flops, projection_flops, state_bytes, train_flops

B, T, WIDTH = 2, 48, 128
FIELDS = {
    "transformer": {"kv_heads": 1},
    "mamba2": {"groups": 2},
    "rwkv7": {},
    "hyena": {"order": 3},
}


def counted(block, forward):
    """FLOPs by operator of a forward pass whose mixer is the fold of the step."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        forward(block)
    by_operator = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    return {
        "mm": sum(n for op, n in by_operator.items() if op in ("aten.mm", "aten.addmm")),
        "bmm": sum(n for op, n in by_operator.items() if op in ("aten.bmm", "aten.baddbmm")),
        "all": sum(by_operator.values()),
    }


def build(arch):
    return archs.build_block(arch, width=WIDTH, max_len=T, backend="reference", **FIELDS[arch])


def run(block):
    block(torch.randn(B, T, WIDTH))


@pytest.mark.parametrize("arch", FIELDS)
def test_projections_are_what_the_counter_sees(arch):
    block = build(arch)
    got = counted(block, run)
    assert got["mm"] + got["bmm"] == got["all"]
    filters = block.filter.flops(T) if arch == "hyena" else 0
    assert got["mm"] == B * projection_flops(block, T) + filters


def products_in_the_mixer(block, arch):
    """The part of `mixer_flops` that the reference does as matrix products."""
    config = block.config
    if arch == "transformer":
        return block.mixer_flops(T)
    if arch == "mamba2":  # the read alone: the write and the decay are element-wise
        convolution = 2 * config.conv_width * config.conv_channels * T
        return (block.mixer_flops(T) - convolution) * 2 // 5
    if arch == "rwkv7":  # what is removed and what is read
        return block.mixer_flops(T) * 4 // 9
    own_tokens = 2 * T  # a token's own tap is element-wise
    return (config.order - 1) * config.width * (T * (T + 1) - own_tokens)


@pytest.mark.parametrize("arch", FIELDS)
def test_mixers_are_what_the_counter_sees(arch):
    block = build(arch)
    assert counted(block, run)["bmm"] == pytest.approx(
        B * products_in_the_mixer(block, arch), rel=0.01
    )


def test_hyena_counts_the_cheaper_of_both_forms():
    """At this length the direct sum; its count is the one the reference was held to above."""
    block = build("hyena")
    config = block.config
    direct = (config.order - 1) * T * (T + 1)
    short = 2 * 3 * (config.order + 1) * T
    gates = (config.order + 2 * (config.order - 1)) * T
    assert block.mixer_flops(T) == config.width * (direct + short + gates)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_counts_only_the_keys_read(window):
    block = archs.build_block("transformer", width=WIDTH, window=window)
    read = [min(t + 1, window or t + 1) for t in range(20)]
    heads = WIDTH // 64
    assert block.mixer_flops(20) == 4 * 64 * heads * sum(read)
    assert block.mixer_flops(6, context=14) == 4 * 64 * heads * sum(read[14:])


@pytest.mark.parametrize("arch", FIELDS)
def test_every_sequence_of_a_batch_counts_but_what_they_share(arch):
    block = build(arch)
    one = projection_flops(block, T) + block.mixer_flops(T)
    assert forward_flops(block, 5, T) == 5 * one + block.shared_flops(T)


@pytest.mark.parametrize("arch", FIELDS)
def test_models_add_up(arch):
    model = archs.build_model(
        arch, width=WIDTH, depth=2, vocab_size=50, options={arch: FIELDS[arch]}
    )
    parts = [forward_flops(block, 3, 40, 7) for block in model.blocks]
    assert model.forward_flops(3, 40, 7) == sum(parts) + 2 * 3 * 40 * WIDTH * 50
    assert model.state_bytes(3, 64) == sum(
        state_bytes(b, 3, 64, torch.float32) for b in model.blocks
    )
    assert train_flops(model.forward_flops(1, 8)) == 3 * model.forward_flops(1, 8)


@pytest.mark.parametrize("arch", FIELDS)
def test_decode_bytes_are_weights_and_state(arch):
    block = build(arch)
    weights = sum(p.numel() * 4 for p in block.parameters())
    if arch == "hyena":
        taps = (block.config.order - 1) * WIDTH * (30 + 1) * 4
        weights += taps - sum(p.numel() * 4 for p in block.filter.parameters())
    state = state_bytes(block, 5, 31, torch.float32)
    assert decode_bytes(block, 5, 30, torch.float32) == weights + state
