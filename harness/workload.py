"""What one cell times: an op, a block or a model on random inputs, and how to check it.

Everything lies on the device asked for before the first call. The timed function reads nothing back
to the host, so that it can be captured in a CUDA graph; `backward` runs on the stream on which
`build` ran its forward pass.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import archs
from archs.block import (
    Block,
    decode_bytes,
    forward_flops,
    parameter_bytes,
    state_bytes,
    tensor_bytes,
    train_flops,
)
from archs.hyena import HyenaBlock
from archs.model import expand_pattern
from harness import correctness, peers
from harness.correctness import ALLOWED_ERROR
from harness.op_inputs import OPS, PEER_OPS, Op, Operation, Randn
from harness.peers import Peer, StandIn
from harness.record import AGAIN, OURS, Case
from harness.sizes import model_of, shape_of
from harness.subjects import BlockSubject, ModelSubject, Subject
from harness.sweep import OPERATIONS, PHASES

__all__ = ["ALLOWED_ERROR", "OPS", "Workload", "build", "build_model", "filled"]

VOCAB_SIZE = 256  # bytes
# Size of a projection's output over its input's. In 32 bits 1, so that a mixer wrong by 0.1 % shows
# in what a block returns (at 0.5, attention's share is below what is allowed). In 16 bits 0.5: at
# 1 the rounding in RWKV-7's gradients grows to 14 %.
PROJECTION_GAIN = {torch.bfloat16: 0.5, torch.float16: 0.5, torch.float32: 1.0, torch.float64: 1.0}
LEARNING_RATE = 1e-5  # so small that what is timed last is what was timed first


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A callable to time and what is known about it without timing.

    `counted` holds params, mixer_flops or forward_flops (and train_flops), state_bytes, for decode
    decode_bytes, and of the timed call itself work_flops and floor_bytes, the least that it must
    move: inputs and parameters read once, results written once.
    """

    function: Callable[[], Any]
    counted: Mapping[str, int]  # analytic metrics, the unit in the name
    check: Callable[[], float]  # relative RMS error of the result; see `harness.correctness`


def build(case: Case, device: str = "cpu") -> Workload:
    """The workload of a cost cell, on "cpu" or "cuda".

    Raises:
        NotImplementedError: there is no such cell, or its implementation cannot run here; the
            message says why.
        BackendUnavailableError: the backend cannot run it.
    """
    levels: dict[str, Callable[..., Workload]] = {"op": _op, "block": _block, "model": _model}
    if case.phase not in PHASES.get(case.level, ()):
        raise NotImplementedError(f"level {case.level!r} has no phase {case.phase!r}")
    return levels[case.level](case, device)


def build_model(case: Case, max_len: int, device: str = "cpu") -> archs.LanguageModel:
    """The model of a case, seeded: an architecture or a hybrid at the case's size.

    Raises:
        NotImplementedError: the case's implementation cannot run here, or stands in for nothing.
    """
    model = model_of(case, shape_of(case.arch, case.size), VOCAB_SIZE, max_len)
    if (peer := _peer(case, device)) is not None:
        peers.stand_in(peer, [block for block in model.blocks if isinstance(block, Block)])
    return model.to(device, _dtype(case))


def filled(state: Any, position: int, generator: torch.Generator) -> Any:
    """A state as it would be at `position`, its tensors random: what they hold costs nothing.

    Uniform in [0, 1): the mean over a long cache must not vanish, or nothing that reads it shows.
    """
    if isinstance(state, Tensor):
        noise = torch.rand(state.shape, generator=generator, device=state.device)
        return noise.to(state.dtype)
    if isinstance(state, tuple):
        parts = [filled(part, position, generator) for part in state]
        state = type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
        return state._replace(position=position) if hasattr(state, "position") else state
    return state


def redraw(module: Any, generator: torch.Generator) -> None:
    """Draw the projections anew, so that every branch counts in the outputs.

    As initialised, some are zero (RWKV-7's output) and most too small: an error in the mixer would
    not show in what a block or a model returns. Their cost does not depend on them.
    """
    if isinstance(module, Block):
        layers = list(module.projections())
    else:
        layers = [layer for block in module.blocks for layer in block.projections()]
        layers.append(module.head)
    with torch.no_grad():
        for layer in layers:
            gain = PROJECTION_GAIN[layer.weight.dtype]
            deviation = gain * layer.weight.shape[1] ** -0.5
            layer.weight.normal_(0, deviation, generator=generator)
        if not isinstance(module, Block):
            module.embedding.weight.normal_(generator=generator)


def _dtype(case: Case) -> torch.dtype:
    return getattr(torch, case.dtype)


def _random(case: Case, device: str) -> tuple[torch.Generator, Randn]:
    generator = torch.Generator(device).manual_seed(case.seed)
    randn = partial(torch.randn, generator=generator, dtype=torch.float32, device=device)
    return generator, randn


def _lengths(case: Case) -> tuple[int, int]:
    """New tokens, and the tokens before them."""
    new, context = (1, case.position) if case.phase == "decode" else (case.seq_len, 0)
    if new is None or context is None:
        raise ValueError(f"{case.phase} needs a {'position' if context is None else 'seq_len'}")
    return new, context


def _peer(case: Case, device: str) -> Peer | None:
    """The peer that a case asks for; None where it asks for ours.

    Raises:
        NotImplementedError: it cannot run here or cannot decode, or the reference is asked for.
    """
    if case.implementation in (OURS, AGAIN):
        return None
    if (peer := peers.PEERS.get(case.implementation)) is None:
        raise NotImplementedError(f"there is no implementation {case.implementation!r}")
    if why := peer.unavailable(device):
        raise NotImplementedError(f"{peer.name}: {why}")
    if case.backend == "reference":
        raise NotImplementedError(f"{peer.name} is no reference: give another backend")
    if case.phase == "decode" and not peer.has_step:
        raise NotImplementedError(f"{peer.name} has no step of its own: decode is ours alone")
    return peer


def _same_step_again(blocks: Iterable[Block]) -> None:
    """NotImplementedError where a decode step's time is not that of its neighbours."""
    if any(isinstance(block, HyenaBlock) and block.config.decode == "lazy" for block in blocks):
        raise NotImplementedError(
            "hyena: a lazy token's time depends on how many twos divide its position, so none can "
            "be timed alone: tests/benchmarks/decode_modes.py times whole sequences"
        )


def _build_block(case: Case, max_len: int, device: str) -> Block:
    if len(expand_pattern(case.arch)) > 1:
        raise NotImplementedError(f"{case.arch} is a hybrid: it has level model only")
    shape = shape_of(case.arch, case.size)
    torch.manual_seed(case.seed)
    block = archs.build_block(
        case.arch, width=shape.width, max_len=max_len, backend=case.backend, **shape.fields
    )
    return block.to(device, _dtype(case))


# Op level: the sequence mixer alone, with the shapes its block gives it.


def _op(case: Case, device: str) -> Workload:
    if case.arch not in OPS:
        raise NotImplementedError(f"{case.arch} has no op of its own to time: use level block")
    new, context = _lengths(case)
    peer = _peer(case, device)
    if peer is not None and peer.op != OPERATIONS[case.arch]:
        raise NotImplementedError(f"{peer.name} implements {peer.op}, which {case.arch} has not")
    block = _build_block(case, new + context, device)
    op = PEER_OPS.get(case.implementation, OPS[case.arch])(block.config, _dtype(case))
    operation = None if peer is None else StandIn(peer)
    whose = case.backend if peer is None else peer.name
    _, randn = _random(case, device)
    state = state_bytes(block, case.batch, new + context, _dtype(case))
    mixer = case.batch * block.mixer_flops(new, context)
    counted = {"mixer_flops": mixer, "state_bytes": state}
    if case.phase == "decode":
        _same_step_again([block])
        return _op_decode(case, op, operation, context, randn, counted)
    counted["work_flops"] = mixer + op.extra_flops(new)
    inputs = op.inputs(case.batch, new, randn)
    read, y_bytes = tensor_bytes(list(inputs.values())), tensor_bytes(inputs[op.LIKE_Y])
    if case.phase == "forward":

        @torch.no_grad()
        def forward() -> Tensor:
            return op.run(inputs, case.backend, operation)

        counted["floor_bytes"] = read + y_bytes
        check = correctness.check_op_forward(op, inputs, whose, forward)
        return Workload(function=forward, counted=counted, check=check)

    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    y = op.run(leaves, case.backend, operation)
    cotangent = randn(*y.shape).to(y.dtype)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, list(leaves.values()), cotangent, retain_graph=True)

    counted["work_flops"] *= 2
    counted["floor_bytes"] = 2 * read + y_bytes
    check = correctness.check_op_backward(op, leaves, y, cotangent, whose, backward)
    return Workload(function=backward, counted=counted, check=check)


def _op_decode(
    case: Case,
    op: Op,
    operation: Operation | None,
    position: int,
    randn: Randn,
    counted: dict[str, int],
) -> Workload:
    token = op.token(case.batch, position, randn)

    @torch.no_grad()
    def decode() -> tuple[Tensor, ...]:
        return op.step(token, case.backend, operation)

    counted["work_flops"] = counted["mixer_flops"]
    counted["floor_bytes"] = tensor_bytes(list(token.values()))
    check = correctness.check_op_decode(op, token, case.backend, decode)
    return Workload(function=decode, counted=counted, check=check)


# Block and model level.


def _block(case: Case, device: str) -> Workload:
    new, context = _lengths(case)
    block = _build_block(case, new + context + 1, device)
    if (peer := _peer(case, device)) is not None:
        peers.stand_in(peer, [block])
    generator, randn = _random(case, device)
    redraw(block, generator)
    dtype, width = _dtype(case), shape_of(case.arch, case.size).width
    x, cotangent = (randn(case.batch, new, width).to(dtype) for _ in range(2))
    counted = {
        "params": sum(p.numel() for p in block.parameters()),
        "forward_flops": forward_flops(block, case.batch, new, context),
        "state_bytes": state_bytes(block, case.batch, new + context, dtype),
    }
    if case.phase == "decode":
        counted["decode_bytes"] = decode_bytes(block, case.batch, context, dtype)
    subject = BlockSubject(
        module=block, inputs=x, following=randn(case.batch, width).to(dtype), target=cotangent
    )
    return _of_subject(case, subject, generator, counted, ends=2 * tensor_bytes(x))


def _model(case: Case, device: str) -> Workload:
    new, context = _lengths(case)
    model = build_model(case, new + context + 1, device)
    generator, _ = _random(case, device)
    redraw(model, generator)
    tokens = torch.randint(
        VOCAB_SIZE, (case.batch, new + 2), generator=generator, device=device
    )  # targets do not follow from inputs: the model must not learn what it is timed on
    counted = {
        "params": model.parameter_count(),
        "forward_flops": model.forward_flops(case.batch, new, context),
        "state_bytes": model.state_bytes(case.batch, new + context),
    }
    if case.phase == "decode":
        counted["decode_bytes"] = model.decode_bytes(case.batch, context)
    inputs = tokens[:, :new].contiguous()
    subject = ModelSubject(
        module=model,
        inputs=inputs,
        following=tokens[:, new],
        target=tokens[:, 1 : new + 1].contiguous(),
    )
    written = case.batch * (1 if case.phase == "prefill" else new) * VOCAB_SIZE
    ends = tensor_bytes(inputs) + written * _dtype(case).itemsize
    return _of_subject(case, subject, generator, counted, ends=ends)


def _of_subject(
    case: Case,
    subject: Subject,
    generator: torch.Generator,
    counted: dict[str, int],
    *,
    ends: int,
) -> Workload:
    """The phases of a block or a model; `ends` is the bytes of its inputs and outputs."""
    new, context = _lengths(case)
    forward = counted["forward_flops"]
    weights = parameter_bytes(subject.module)
    room = new + context + 1  # one more token than is timed, for the check
    function: Callable[[], Any]
    if case.phase == "forward":
        function = torch.no_grad()(subject.forward)
        check = correctness.check_forward(subject, function)
        work, floor = forward, weights + ends
    elif case.phase == "prefill":
        function = torch.no_grad()(partial(subject.prefill, room))
        check = correctness.check_prefill(subject, function, room)
        work, floor = forward, weights + ends + counted["state_bytes"]
    elif case.phase == "decode":
        _same_step_again(subject.blocks())
        state = filled(subject.init_state(case.batch, room), context, generator)
        # A consumed cache may be stepped again: that overwrites the same slot.
        function = torch.no_grad()(partial(subject.step, subject.inputs[:, 0], state))
        check = correctness.check_decode(subject, state, function, room)
        work, floor = forward, counted["decode_bytes"]
    elif case.phase == "backward":
        outputs, function = _backward(subject)
        check = correctness.check_backward(subject, outputs, function)
        # Read: parameters, inputs, the gradient of the outputs. Written: the first two's gradients.
        leaves = tensor_bytes(subject.inputs) if subject.inputs.is_floating_point() else 0
        work, floor = 2 * forward, 2 * weights + ends + leaves
    else:
        function = _train_step(subject)
        check = correctness.check_train_step(subject)
        counted["train_flops"] = work = train_flops(forward)
        # Parameters and AdamW's two moments are read and written.
        floor = 6 * weights + ends
    counted |= {"work_flops": work, "floor_bytes": floor}
    return Workload(function=function, counted=counted, check=check)


def _leaves(subject: Subject) -> list[Tensor]:
    """What gradients are taken of: the parameters, and a block's inputs."""
    if subject.inputs.is_floating_point():
        return [subject.inputs.requires_grad_(), *subject.parameters()]
    return list(subject.parameters())


def _backward(subject: Subject) -> tuple[Tensor, Callable[[], tuple[Tensor | None, ...]]]:
    """The outputs, and the backward pass through the graph that they keep."""
    leaves = _leaves(subject)
    outputs = subject.forward()
    objective, seed = subject.objective(outputs)
    return outputs, partial(
        torch.autograd.grad, objective, leaves, seed, retain_graph=True, allow_unused=True
    )


def _train_step(subject: Subject) -> Callable[[], None]:
    leaves = _leaves(subject)
    on_cuda = subject.inputs.device.type == "cuda"
    # On CUDA the plain loop would launch a kernel a parameter, and could not be captured.
    kernel: dict[str, Any] = {"fused": True, "capturable": True} if on_cuda else {}
    dtype = subject.parameters()[0].dtype
    eps = 1e-4 if dtype == torch.float16 else 1e-8  # 1e-8 is 0 in float16, and an update NaN
    optimiser = torch.optim.AdamW(subject.parameters(), lr=LEARNING_RATE, eps=eps, **kernel)

    def step() -> None:
        objective, seed = subject.objective(subject.forward())
        objective.backward(seed)
        optimiser.step()
        for leaf in leaves:
            leaf.grad = None

    return step
