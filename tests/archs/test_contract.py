"""The contract of `archs.block`, shown for every architecture on every backend that runs here."""

import copy
from collections import defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import archs
from archs.block import Block, BlockConfig, BlockOutput, state_bytes, tensor_bytes
from archs.model import expand_pattern
from archs.ops import BackendUnavailableError
from harness import peers
from kernel_checks import LUCK, relative_rms

WIDTH = 32
MAX_LEN = 1024
SMALL = {
    "transformer": {"head_dim": 8, "kv_heads": 2},
    "mamba2": {"head_dim": 16, "d_state": 16},
    "rwkv7": {"head_dim": 16, "decay_rank": 4, "rate_rank": 4, "value_rank": 4, "gate_rank": 4},
    "hyena": {"filter_width": 16},
}
# Variants run through the same tests: each exercises a code path of its own.
VARIANTS = {
    **{name: (name, fields) for name, fields in SMALL.items()},
    "transformer-window": ("transformer", {"head_dim": 8, "kv_heads": 4, "window": 7}),
    "mamba2-groups": ("mamba2", {"head_dim": 16, "d_state": 16, "groups": 2, "conv_width": 3}),
    "hyena-order-3": ("hyena", {"filter_width": 16, "order": 3}),
    "hyena-lazy": ("hyena", {"filter_width": 16, "decode": "lazy"}),
    "hybrid": ("hybrid", {}),
    "transformer-sdpa-math": ("transformer", {"head_dim": 8, "kv_heads": 2}),
    "mamba2-ssd-minimal": ("mamba2", {"head_dim": 16, "d_state": 16, "groups": 2}),
}
# Those in which a library's operation stands in for ours, where the backend is not the reference.
PEERS = {"transformer-sdpa-math": "sdpa-math", "mamba2-ssd-minimal": "ssd-minimal"}
BACKENDS = ("reference", "torch", "triton")
# The variants whose operations all have Triton kernels, in sizes that these take; the interpreter
# takes minutes for the last.
SLOW = ("hyena-order-3",)
BUILT = ("transformer", "transformer-window", "mamba2", "mamba2-groups", "rwkv7", "hyena", *SLOW)
LENGTHS = (1, 2, 3, 17, 63, 64, 65, 127, 1000)
INTERPRETED = not torch.cuda.is_available()
HYBRID = "mamba2+transformer+rwkv7+hyena+rwkv7"
BY_FFT = ("hyena", "hyena-order-3", "hyena-lazy", "hybrid")  # exact to rounding only

CASES = [
    (v, b)
    for v in VARIANTS
    for b in BACKENDS
    if not (v in PEERS and b != "torch")
    and not (b == "triton" and (v not in BUILT or (v in SLOW and INTERPRETED)))
]
every_block = pytest.mark.parametrize(("variant", "backend"), CASES)
every_pattern = pytest.mark.parametrize("pattern", [*SMALL, HYBRID])
PATTERNS = [
    (p, b) for p in (*SMALL, HYBRID) for b in BACKENDS if p in (*BUILT, HYBRID) or b != "triton"
]
every_pattern_and_backend = pytest.mark.parametrize(("pattern", "backend"), PATTERNS)


def widest(backend: str) -> torch.dtype:
    """The most exact type of a backend: kernels have no float64."""
    return torch.float32 if backend == "triton" else torch.float64


def tolerance(backend: str, of_float64: float) -> float:
    """What may remain of a difference in the most exact type of a backend."""
    return max(of_float64, 1e-5) if backend == "triton" else of_float64


def randomise(module: nn.Module) -> None:
    """Move every parameter off its initial value: some start at zero and would hide a path."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter.dtype))


class StackState(NamedTuple):
    blocks: tuple[Any, ...]
    position: int


class Stack(Block):
    """All four architectures in a row, as one block: the contract must hold for it too."""

    Config = BlockConfig

    def __init__(self, backend: str) -> None:
        super().__init__(BlockConfig(width=WIDTH))
        # RWKV-7 with other heads than alone.
        options = {**SMALL, "rwkv7": {**SMALL["rwkv7"], "head_dim": 8}}
        model = archs.build_model(
            HYBRID, width=WIDTH, max_len=MAX_LEN, backend=backend, options=options
        )
        self.blocks = model.blocks

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "backend":
            for block in getattr(self, "blocks", ()):
                block.backend = value

    def forward(self, x, state=None, carry=None):
        return self.run("forward", x, state, carry)

    def step(self, x, state, carry=None):
        return self.run("step", x, state, carry)

    def run(self, method, x, state, carry):
        after = []
        for i, block in enumerate(self.blocks):
            before = None if state is None else state.blocks[i]
            x, end, carry = getattr(block, method)(x, before, carry)
            after.append(end)
        if state is None:
            assert after == [None] * len(after)
            return BlockOutput(x, None, carry)
        return BlockOutput(x, StackState(tuple(after), after[0].position), carry)

    def init_state(self, batch, max_len, *, device, dtype):
        states = (b.init_state(batch, max_len, device=device, dtype=dtype) for b in self.blocks)
        return StackState(tuple(states), 0)

    def mixer_flops(self, new_tokens, context=0):
        return sum(block.mixer_flops(new_tokens, context) for block in self.blocks)

    def final_norm(self):
        return self.blocks[-1].final_norm()


def build(variant: str, backend: str = "torch", dtype=None, **place) -> Block:
    name, fields = VARIANTS[variant]
    dtype = dtype or widest(backend)
    torch.manual_seed(0)
    if name == "hybrid":
        block = Stack(backend).to(dtype)
    else:
        block = archs.build_block(
            name, width=WIDTH, max_len=MAX_LEN, backend=backend, **place, **fields
        ).to(dtype)
    if variant in PEERS:
        peers.stand_in(peers.PEERS[PEERS[variant]], [block])
    randomise(block)
    return block


def tensors(state) -> list[Tensor]:
    """All tensors of a state, in order."""
    if isinstance(state, tuple):
        return [tensor for part in state for tensor in tensors(part)]
    return [state] if isinstance(state, Tensor) else []


def mapped(state, function):
    """The state with `function` applied to every tensor."""
    if isinstance(state, tuple):
        parts = [mapped(part, function) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return function(state) if isinstance(state, Tensor) else state


def model(
    pattern: str, backend: str = "torch", dtype=None, depth=None, max_len=MAX_LEN, width=WIDTH
):
    torch.manual_seed(0)
    names = set(expand_pattern(pattern))
    return archs.build_model(
        pattern,
        width=width,
        depth=depth,
        vocab_size=64,
        max_len=max_len,
        backend=backend,
        options={name: SMALL[name] for name in names},
    ).to(dtype or widest(backend))


def tokens_in(shape, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def fresh(block: Block, x: Tensor, max_len: int = MAX_LEN):
    return block.init_state(len(x), max_len, device=x.device, dtype=x.dtype)


def kernels_are_slow(backend: str, length: int) -> bool:
    return backend == "triton" and INTERPRETED and length > 20


def fold(block: Block, x: Tensor, state):
    """The definition: one step after another."""
    outputs = []
    for t in range(x.shape[1]):
        y, state, _ = block.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def assert_same(got, expected, tolerance: float) -> None:
    """Largest difference over largest value, through nested states; positions exactly."""
    if isinstance(expected, Tensor):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        scale = expected.detach().abs().max().clamp_min(1e-12)
        assert ((got - expected).abs().max() / scale).item() <= tolerance
    elif isinstance(expected, tuple):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b, tolerance)
    else:
        assert got == expected


@every_block
@pytest.mark.parametrize("length", LENGTHS)
def test_forward_is_the_fold_of_step(variant, backend, length):
    if (variant, backend, length) == ("mamba2-groups", "triton", 1000):
        pytest.skip("minutes in the interpreter, and the other variant shows it")
    block, x = build(variant, backend), tokens_in((2, length, WIDTH), widest(backend))
    # A kernel a token takes minutes in the interpreter: there few tokens are folded with kernels.
    definition = (
        build(variant, "reference", torch.float32) if kernels_are_slow(backend, length) else block
    )
    with torch.no_grad():
        expected, expected_state = fold(definition, x, fresh(definition, x))
        got, state, _ = block(x, fresh(block, x))
        alone = block(x)
    assert_same(got, expected, tolerance(backend, 1e-10))
    assert_same(state, expected_state, tolerance(backend, 1e-10))
    assert state.position == length
    assert_same(alone.x, expected, tolerance(backend, 1e-10))
    assert alone.state is None


@every_block
def test_every_split_hands_the_state_over(variant, backend):
    slow = kernels_are_slow(backend, 65)  # every split of the operation: test_ssd_kernel.py
    block, x = build(variant, backend), tokens_in((1 if slow else 2, 65, WIDTH), widest(backend))
    with torch.no_grad():
        expected, expected_state, _ = block(x, fresh(block, x))
        for split in (1, 2, 3, 31, 32, 33, 63, 64) if slow else range(1, 65):
            head, state, _ = block(x[:, :split], fresh(block, x))
            tail, state, _ = block(x[:, split:], state)
            assert_same(torch.cat((head, tail), dim=1), expected, tolerance(backend, 1e-10))
            assert_same(state, expected_state, tolerance(backend, 1e-10))


@every_block
def test_forward_in_three_pieces_then_steps(variant, backend):
    block, x = build(variant, backend), tokens_in((3, 90, WIDTH), widest(backend))
    with torch.no_grad():
        expected = block(x).x
        pieces, state = [], fresh(block, x, max_len=90)
        for start, end in ((0, 20), (20, 21), (21, 80)):
            y, state, _ = block(x[:, start:end], state)
            pieces.append(y)
        y, state = fold(block, x[:, 80:], state)
    assert_same(torch.cat((*pieces, y), dim=1), expected, tolerance(backend, 1e-10))


@every_block
@pytest.mark.parametrize("position", [0, 1, 40, 69])
def test_causality(variant, backend, position):
    block, x = build(variant, backend), tokens_in((1, 70, WIDTH), widest(backend))
    changed = x.clone()
    changed[:, position] *= -1.0
    with torch.no_grad():
        before, after = block(x).x, block(changed).x
    if position:
        # An FFT mixes all positions, so its causality holds to rounding only.
        exact = variant not in BY_FFT or backend == "reference"
        allowed = 0.0 if exact else tolerance(backend, 1e-12)
        assert_same(after[:, :position], before[:, :position], allowed)
    assert (after[:, position] - before[:, position]).abs().max() > 1e-3


@every_block
@pytest.mark.parametrize("length", [1, 65])
def test_batch_rows_are_independent(variant, backend, length):
    block, x = build(variant, backend), tokens_in((4, length, WIDTH), widest(backend))
    with torch.no_grad():
        together = block(x).x
        for row in range(4):
            assert_same(
                block(x[row : row + 1]).x, together[row : row + 1], tolerance(backend, 1e-12)
            )


@every_block
def test_non_contiguous_input(variant, backend):
    block = build(variant, backend)
    wide = tokens_in((WIDTH, 2, 66), widest(backend))
    wide = wide.permute(1, 2, 0)[:, ::2]  # (2, 33, WIDTH), strides mixed
    assert not wide.is_contiguous()
    with torch.no_grad():
        expected, expected_state, _ = block(wide.contiguous(), fresh(block, wide))
        got, state, _ = block(wide, fresh(block, wide))
    assert_same(got, expected, tolerance(backend, 1e-12))
    assert_same(state, expected_state, tolerance(backend, 1e-12))


@every_block
def test_gradients_of_forward_are_those_of_the_fold(variant, backend):
    length, split = (5, 2) if kernels_are_slow(backend, 21) else (21, 8)
    block, x = build(variant, backend), tokens_in((2, length, WIDTH), widest(backend))
    x.requires_grad_()
    weight = tokens_in((2, length, WIDTH), widest(backend)).sin()
    wanted = (x, *block.parameters())
    head, state, _ = block(x[:, :split], fresh(block, x))
    tail, _, _ = block(x[:, split:], state)
    handed_over = torch.autograd.grad((torch.cat((head, tail), 1) * weight).sum(), wanted)
    expected = torch.autograd.grad((fold(block, x, fresh(block, x))[0] * weight).sum(), wanted)
    got = torch.autograd.grad((block(x).x * weight).sum(), wanted)
    for (name, _), a, b, c in zip(
        [("x", x), *block.named_parameters()], got, expected, handed_over, strict=True
    ):
        assert b.abs().max() > 0, f"no gradient reaches {name}"
        assert_same(a, b, tolerance(backend, 1e-9))
        assert_same(c, b, tolerance(backend, 1e-9))


def results(block: Block, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The output and, of its product with a weight, all gradients, by name."""
    wanted = {"x": x.detach().requires_grad_(), **dict(block.named_parameters())}
    y = block(wanted["x"]).x
    gradients = torch.autograd.grad((y * weight).sum(), list(wanted.values()))
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 17, 65])
def test_torch_equals_reference_with_all_gradients(variant, length):
    x = tokens_in((2, length, WIDTH))
    expected = results(build(variant, "reference"), x, x.cos())
    got = results(build(variant, "torch"), x, x.cos())
    assert got.keys() == expected.keys()
    for name in got:
        if length > 1 or expected[name].abs().max() > 1e-6:
            assert_same(got[name], expected[name], 1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 17, 65])
def test_in_float32_torch_errs_no_more_than_the_reference(variant, length):
    """Over several inputs: the gradient of a single one may lose most of its digits by chance."""
    dtype, inputs = torch.float32, 8
    blocks = [build(variant, backend, dtype) for backend in ("torch", "reference")]
    exact = copy.deepcopy(blocks[1]).double()
    squares = [defaultdict[str, float](float) for _ in blocks]
    for x in tokens_in((inputs, 2, length, WIDTH), dtype):
        expected = results(exact, x.double(), x.cos().double())
        for block, found in zip(blocks, squares, strict=True):
            for name, value in results(block, x, x.cos()).items():
                assert value.dtype == dtype
                if expected[name].abs().max() > 1e-6:
                    found[name] += relative_rms(value, expected[name]) ** 2 / inputs
    error, allowed = (max(found.values()) ** 0.5 for found in squares)
    assert error <= 2 * allowed + LUCK * torch.finfo(dtype).eps


@every_block
def test_declared_state_bytes_are_allocated(variant, backend):
    block, x = build(variant, backend, torch.float32), tokens_in((3, 40, WIDTH), torch.float32)
    declared = state_bytes(block, 3, 50, torch.float32)
    state = fresh(block, x, max_len=50)
    assert tensor_bytes(state) == declared > 0
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors(state)}
    assert sum(storage.nbytes() for storage in storages.values()) == declared
    with torch.no_grad():
        _, state, _ = block(x, state)
        assert tensor_bytes(state) == declared
        _, state, _ = block.step(x[:, 0], state)
    assert tensor_bytes(state) == declared


def refused(backend: str, dtype: torch.dtype) -> str | None:
    """What a backend says to a type that it does not have here."""
    if backend == "triton" and dtype == torch.float64:
        return "has no kernels in float64"
    if backend == "triton" and dtype == torch.bfloat16 and INTERPRETED:
        return "interpreter computes bfloat16 wrongly"
    return None


@every_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_types_in_and_out(variant, backend, dtype):
    if (words := refused(backend, dtype)) is not None:
        block, x = build(variant, backend, dtype), tokens_in((2, 3, WIDTH), dtype)
        with torch.no_grad(), pytest.raises(BackendUnavailableError, match=words):
            block(x)
        with torch.no_grad(), pytest.raises(BackendUnavailableError, match=words):
            block.step(x[:, 0], fresh(block, x))
        return
    block, x = build(variant, backend, dtype), tokens_in((2, 19, WIDTH), dtype)
    with torch.no_grad():
        state = fresh(block, x)
        types = [t.dtype for t in tensors(state)]
        y, state, _ = block(x, state)
        assert y.dtype == dtype
        assert [t.dtype for t in tensors(state)] == types
        y, state, _ = block.step(x[:, 0], state)
    assert y.dtype == dtype
    assert [t.dtype for t in tensors(state)] == types
    assert y.isfinite().all()
    for part in types:
        assert part in {dtype, torch.float64 if dtype == torch.float64 else torch.float32}


@every_block
def test_bfloat16_errs_by_rounding_only(variant, backend):
    if refused(backend, torch.bfloat16) is not None:
        pytest.skip("the interpreter refuses bfloat16")
    rounded, x = build(variant, backend, torch.bfloat16), tokens_in((2, 65, WIDTH), torch.bfloat16)
    exact = copy.deepcopy(rounded).double()  # the same weights: what is left is arithmetic
    with torch.no_grad():
        expected = exact(x.double()).x - x.double()
        got = (rounded(x).x - x).double()
    error = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.02


@every_block
def test_foreign_carry_passes_through(variant, backend):
    block, x = build(variant, backend), tokens_in((1, 5, WIDTH), widest(backend))
    carry = {"elsewhere": torch.ones(1)}
    for state in (None, fresh(block, x)):
        assert block(x, state, carry).carry["elsewhere"] is carry["elsewhere"]
    assert block.step(x[:, 0], fresh(block, x), carry).carry["elsewhere"] is carry["elsewhere"]
    assert list(carry) == ["elsewhere"]


@every_block
def test_nothing_is_written_in_place_where_gradients_flow(variant, backend):
    block, x = build(variant, backend), tokens_in((2, 12, WIDTH), widest(backend))
    with torch.no_grad():
        _, state, _ = block(x, fresh(block, x, max_len=40))
    state = mapped(state, lambda t: t.clone().requires_grad_())
    kept = [t.detach().clone() for t in tensors(state)]
    y, after, _ = block(x, state)
    z, _, _ = block.step(x[:, 0], after)
    parts = tensors(state)
    gradients = torch.autograd.grad(y.sum() + z.sum(), parts)
    for part, before, gradient in zip(parts, kept, gradients, strict=True):
        assert torch.equal(part, before)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_move_between_backends(variant):
    a, b = build(variant, "reference"), build(variant, "torch")
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.zero_()
    b.load_state_dict(a.state_dict())
    x = tokens_in((1, 9, WIDTH))
    assert_same(b(x).x, a(x).x, 1e-10)
    b.backend = "reference"
    assert torch.equal(b(x).x, a(x).x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_copy_is_independent(variant):
    block, x = build(variant), tokens_in((1, 9, WIDTH))
    with torch.no_grad():
        before = fold(block, x, fresh(block, x))[0]
        twin = copy.deepcopy(block)
        randomise(twin)
        assert not torch.equal(fold(twin, x, fresh(twin, x))[0], before)
        assert torch.equal(fold(block, x, fresh(block, x))[0], before)


@pytest.mark.parametrize("variant", [v for v, b in CASES if b == "triton"])
@pytest.mark.parametrize("length", [1, 17, 65])
def test_triton_equals_torch_with_all_gradients(variant, length):
    x = tokens_in((2, length, WIDTH), torch.float32).requires_grad_()
    weight = tokens_in((2, length, WIDTH), torch.float32).cos()
    results = []
    for backend in ("torch", "triton"):
        block = build(variant, backend, torch.float32)
        y = block(x).x
        results.append((y, *torch.autograd.grad((y * weight).sum(), (x, *block.parameters()))))
    for got, expected in zip(results[1], results[0], strict=True):
        if length > 1 or expected.abs().max() > 1e-6:
            assert_same(got, expected, 2e-5)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in (*PEERS, *BUILT, "hybrid")])
def test_triton_says_that_it_is_not_built(variant):
    block = build(variant, "triton", torch.float32)
    x = tokens_in((1, 9, WIDTH), torch.float32)
    with pytest.raises(BackendUnavailableError, match="not built yet"):
        block(x, fresh(block, x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_additive_over_a_split(variant):
    block = build(variant)
    for start in (1, 8, 60):
        whole = block.mixer_flops(100)
        parts = block.mixer_flops(start) + block.mixer_flops(100 - start, start)
        if variant in BY_FFT:
            assert parts >= whole  # an FFT over the whole is cheaper than over its parts
        else:
            assert parts == whole


@pytest.mark.parametrize("variant", ["transformer", "mamba2", "rwkv7", "hyena"])
def test_growth_of_counted_work_and_state(variant):
    block = build(variant)
    work = [block.mixer_flops(n) for n in (2**14, 2**15)]
    state = [state_bytes(block, 1, n, torch.float32) for n in (2**9, 2**10)]
    expected_work = {"transformer": 2.0, "hyena": 1.1}.get(variant, 1.0)
    growth = torch.tensor(work[1] / work[0]).log2().item()
    assert abs(growth - expected_work) < 0.03
    grows = variant in {"transformer", "hyena"}
    assert (state[1] > 1.9 * state[0]) if grows else (state[1] == state[0])


@every_pattern_and_backend
def test_model_decodes_as_it_reads(pattern, backend):
    net = model(pattern, backend)
    randomise(net)
    tokens = torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = net(tokens).logits
        logits, state = net.prefill(tokens[:, :11], 30)
        assert_same(logits, expected[:, 10], tolerance(backend, 1e-10))
        for t in range(11, 30):
            logits, state = net.decode(tokens[:, t], state)
            assert_same(logits, expected[:, t], tolerance(backend, 1e-10))
        assert state.position == 30
        _, state = net(tokens[:, :11], net.init_state(2, 30))
        again, state = net(tokens[:, 11:], state)
    assert_same(again, expected[:, 11:], tolerance(backend, 1e-10))
    assert state.position == 30


@every_pattern
def test_model_is_causal_and_rows_are_independent(pattern):
    net = model(pattern)
    randomise(net)
    tokens = torch.randint(64, (3, 40), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[:, 25] = (changed[:, 25] + 1) % 64
    with torch.no_grad():
        before, after = net(tokens).logits, net(changed).logits
        assert_same(after[:, :25], before[:, :25], 1e-12)
        assert (after[:, 25:] - before[:, 25:]).abs().max() > 1e-3
        assert_same(net(tokens[1:2]).logits, before[1:2], 1e-12)


@every_pattern
def test_generate_takes_the_likeliest_token(pattern):
    net = model(pattern, max_len=24)
    randomise(net)
    prompt = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(4))
    got = net.generate(prompt, 15)
    expected = prompt
    with torch.no_grad():
        for _ in range(15):
            following = net(expected).logits[:, -1].argmax(dim=-1)
            expected = torch.cat((expected, following[:, None]), dim=1)
    assert torch.equal(got, expected)


def test_generate_samples_reproducibly():
    net = model("mamba2", depth=2, max_len=24)
    prompt = torch.zeros(2, 3, dtype=torch.long)
    draws = [
        net.generate(prompt, 20, temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def losses_of_twenty_steps(pattern, backend, learning_rate, rows=8, length=32, width=WIDTH):
    depth = None if pattern == HYBRID else 2
    net = model(pattern, backend, torch.float32, depth, width=width)
    optimiser = torch.optim.AdamW(net.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(5)
    start = torch.randint(64, (rows, 1), generator=generator)
    tokens = (start + torch.arange(length + 1) * 5) % 64  # the next byte follows from the last
    losses = []
    for _ in range(20):
        logits = net(tokens[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        optimiser.step()
        losses.append(loss.item())
    return losses


@every_pattern
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_twenty_training_steps_lower_the_loss(pattern, backend):
    losses = losses_of_twenty_steps(pattern, backend, 3e-3)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("pattern", [p for p in SMALL if p in BUILT])
def test_triton_trains_as_torch_does(pattern):
    size = {"rows": 1, "length": 10, "width": 16} if INTERPRETED else {}
    expected = losses_of_twenty_steps(pattern, "torch", 1e-3, **size)
    assert expected[-1] < 0.95 * expected[0]
    got = losses_of_twenty_steps(pattern, "triton", 1e-3, **size)
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_value_residual_reaches_block_0_through_the_carry(backend):
    first = build("rwkv7", backend, layer_index=0, depth=2)
    second = build("rwkv7", backend, layer_index=1, depth=2)
    x, other = tokens_in((2, 12, WIDTH)), tokens_in((2, 12, WIDTH)).sin()
    carry = first(x).carry
    value_projection = dict(first.named_parameters())[VALUE_PROJECTION]
    # `other` does not depend on block 0, so the carry is the only way.
    (gradient,) = torch.autograd.grad(second(other, None, carry).x.sum(), value_projection)
    assert gradient.abs().max() > 1e-4


VALUE_PROJECTION = "time_mix.value.weight"


def test_value_residual_in_a_hybrid_skips_other_blocks():
    net = model("rwkv7+mamba2+rwkv7")
    randomise(net)
    first, middle, last = net.blocks
    x = tokens_in((1, 6, WIDTH))
    carry = first(x).carry
    passed = middle(x, None, carry).carry
    assert passed["rwkv7"] is carry["rwkv7"]
    assert last(x, None, passed).carry["rwkv7"] is carry["rwkv7"]
    with pytest.raises(ValueError, match="carry"):
        last(x)
