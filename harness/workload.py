"""What one cell times: an op, a block or a model, its inputs, and how to check it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import archs
from archs.block import Block, BlockConfig, forward_flops, state_bytes, train_flops
from archs.hyena import HyenaConfig
from archs.mamba2 import Mamba2Config
from archs.ops.attention import attention
from archs.ops.long_conv import long_conv
from archs.ops.ssd import ssd
from archs.ops.wkv7 import wkv7
from archs.rwkv7 import RWKV7Config
from archs.transformer import TransformerConfig
from harness.record import Case
from harness.sizes import shape_of

VOCAB_SIZE = 256  # bytes
CHECKED_TOKENS = 256  # every op is causal: a prefix shows it right at any length
# Relative RMS error that an op may have against its reference, by type of its inputs.
ALLOWED_ERROR = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A callable to time and what is known about it without timing."""

    function: Callable[[], Any]
    counted: Mapping[str, int]  # analytic metrics, the unit in the name
    error: Callable[[], float] | None = None  # relative RMS error against the reference
    leaves: tuple[Tensor, ...] = field(default=())  # whose gradients are cleared each time


def build(case: Case) -> Workload:
    """The workload of a cost cell.

    Raises:
        NotImplementedError: the architecture has no such cell.
    """
    generator = torch.Generator().manual_seed(case.seed)
    randn = partial(torch.randn, generator=generator, dtype=torch.float32)
    return {"op": _op, "block": _block, "model": _model}[case.level](case, randn)


def _dtype(case: Case) -> torch.dtype:
    return getattr(torch, case.dtype)


def _built_block(case: Case, max_len: int) -> Block:
    shape = shape_of(case.arch, case.size)
    torch.manual_seed(case.seed)
    block = archs.build_block(
        case.arch, width=shape.width, max_len=max_len, backend=case.backend, **shape.fields
    )
    return block.to(_dtype(case))


def _block_counts(case: Case, block: Block, new_tokens: int) -> dict[str, int]:
    return {
        "params": sum(p.numel() for p in block.parameters()),
        "forward_flops": forward_flops(block, case.batch, new_tokens),
        "state_bytes": state_bytes(block, case.batch, new_tokens, _dtype(case)),
    }


# Op level: the sequence mixer alone, with the shapes its block gives it.

Randn = Callable[..., Tensor]
OpCall = tuple[Callable[..., Any], dict[str, Tensor]]


def _attention(config: TransformerConfig, B: int, T: int, randn: Randn) -> OpCall:
    heads = config.width // config.head_dim
    kv_heads = config.kv_heads or heads
    call = partial(attention, window=config.window)
    return call, {
        "q": randn(B, T, heads, config.head_dim),
        "k": randn(B, T, kv_heads, config.head_dim),
        "v": randn(B, T, kv_heads, config.head_dim),
    }


def _ssd(config: Mamba2Config, B: int, T: int, randn: Randn) -> OpCall:
    heads = config.expand * config.width // config.head_dim
    dt = torch.nn.functional.softplus(randn(B, T, heads) - 4)  # as dt_bias starts: 1e-3 to 0.1
    return ssd, {
        "x": randn(B, T, heads, config.head_dim),
        "log_decay": -dt * torch.linspace(1, 16, heads),
        "b": randn(B, T, config.groups, config.d_state),
        "c": randn(B, T, config.groups, config.d_state),
        "dt": dt,
        "skip": torch.ones(heads),
    }


def _wkv7(config: RWKV7Config, B: int, T: int, randn: Randn) -> OpCall:
    shape = (B, T, config.width // config.head_dim, config.head_dim)
    removal = torch.nn.functional.normalize(randn(*shape), dim=-1)
    return partial(wkv7, log_decay=None), {
        "r": randn(*shape),
        "k": randn(*shape),
        "v": randn(*shape),
        "a": -removal,
        "b": removal * torch.sigmoid(randn(*shape)),
        "decay_logits": randn(*shape),
    }


def _long_conv(config: HyenaConfig, B: int, T: int, randn: Randn) -> OpCall:
    D = config.width
    return long_conv, {
        "u": randn(B, D, T),
        "filter": randn(D, T) * torch.exp(-8 * torch.arange(T) / T),
        "pre_gate": randn(B, D, T),
        "post_gate": randn(B, D, T),
        "skip": randn(D),
        "short_filters": randn(3, D, 3),
        "short_bias": randn(3, D),
    }


OPS: dict[str, Callable[[Any, int, int, Randn], OpCall]] = {
    "transformer": _attention,
    "mamba2": _ssd,
    "rwkv7": _wkv7,
    "hyena": _long_conv,
}
TIME_LAST = {"u", "filter", "pre_gate", "post_gate"}  # (..., T); all else has T second or none
TIMELESS = {"skip", "short_filters", "short_bias"}


def _op(case: Case, randn: Randn) -> Workload:
    if case.arch not in OPS or case.seq_len is None:
        raise NotImplementedError(f"{case.arch} has no op of its own to time: use level block")
    block = _built_block(case, case.seq_len)
    call, inputs = OPS[case.arch](_config(block), case.batch, case.seq_len, randn)
    inputs = {name: t.to(_dtype(case)) for name, t in inputs.items()}
    mixer = case.batch * block.mixer_flops(case.seq_len)
    return Workload(
        function=lambda: call(**inputs, backend=case.backend),
        counted={
            "mixer_flops": mixer,
            "state_bytes": state_bytes(block, case.batch, case.seq_len, _dtype(case)),
        },
        error=partial(_prefix_error, call, inputs, case.backend),
    )


def _config(block: Block) -> BlockConfig:
    return block.config  # type: ignore[return-value]


def _prefix_error(call: Callable[..., Any], inputs: dict[str, Tensor], backend: str) -> float:
    """Relative RMS error over the first tokens of the timed tensors against the reference."""
    whole = _output(call(**inputs, backend=backend))
    prefix = {name: _prefix(name, t).double() for name, t in inputs.items()}
    expected = _output(call(**prefix, backend="reference"))
    in_time = 2 if "u" in inputs else 1
    got = whole.narrow(in_time, 0, expected.shape[in_time]).double()
    return ((got - expected).square().mean() / expected.square().mean()).sqrt().item()


def _prefix(name: str, tensor: Tensor) -> Tensor:
    if name in TIMELESS:
        return tensor
    return tensor[..., :CHECKED_TOKENS] if name in TIME_LAST else tensor[:, :CHECKED_TOKENS]


def _output(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _block(case: Case, randn: Randn) -> Workload:
    assert case.seq_len is not None
    block = _built_block(case, case.seq_len)
    x = randn(case.batch, case.seq_len, shape_of(case.arch, case.size).width).to(_dtype(case))
    counts = _block_counts(case, block, case.seq_len)
    if case.phase == "forward":
        return Workload(function=_without_gradients(lambda: block(x).x), counted=counts)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    optimiser = torch.optim.AdamW(block.parameters(), lr=1e-5)
    x.requires_grad_()

    def step() -> None:
        block(x).x.backward(cotangent)
        optimiser.step()
        optimiser.zero_grad()
        x.grad = None

    return Workload(
        function=step, counted={**counts, "train_flops": train_flops(counts["forward_flops"])}
    )


def _model(case: Case, randn: Randn) -> Workload:
    new_tokens = case.seq_len or 1
    context = case.position or 0
    model = build_model(case, max_len=new_tokens + context)
    counts = {
        "params": model.parameter_count(),
        "forward_flops": model.forward_flops(case.batch, new_tokens, context),
        "state_bytes": model.state_bytes(case.batch, new_tokens + context),
    }
    generator = torch.Generator().manual_seed(case.seed)
    tokens = torch.randint(VOCAB_SIZE, (case.batch, new_tokens), generator=generator)
    if case.phase == "decode":
        state = filled(model.init_state(case.batch, context + 1), context, generator)
        counts["decode_bytes"] = model.decode_bytes(case.batch, context)
        # A consumed state may be stepped again: it overwrites the same slot.
        call = _without_gradients(lambda: model.decode(tokens[:, 0], state))
    elif case.phase == "prefill":
        call = _without_gradients(lambda: model.prefill(tokens, new_tokens))
    elif case.phase == "forward":
        call = _without_gradients(lambda: model(tokens))
    else:
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def call() -> None:
            logits = model(tokens).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
            optimiser.step()
            optimiser.zero_grad()

        counts["train_flops"] = train_flops(counts["forward_flops"])
    return Workload(function=call, counted=counts)


def build_model(case: Case, max_len: int) -> archs.LanguageModel:
    """The model of a case, seeded: an architecture or a hybrid at the case's size."""
    shape = shape_of(case.arch, case.size)
    torch.manual_seed(case.seed)
    model = archs.build_model(
        case.arch,
        width=shape.width,
        depth=shape.depth,
        vocab_size=VOCAB_SIZE,
        max_len=max_len,
        backend=case.backend,
        options={case.arch: shape.fields} if shape.fields else None,
    )
    return model.to(_dtype(case))


def filled(state: Any, position: int, generator: torch.Generator) -> Any:
    """A state as it would be at `position`, its tensors random: what they hold costs nothing."""
    if isinstance(state, Tensor):
        return (0.1 * torch.randn(state.shape, generator=generator)).to(state.dtype)
    if isinstance(state, tuple):
        parts = [filled(part, position, generator) for part in state]
        state = type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
        return state._replace(position=position) if hasattr(state, "position") else state
    return state


def _without_gradients(function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return function()

    return call
