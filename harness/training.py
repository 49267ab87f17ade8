"""Training: one loop for every kind of run, resumable to the last bit.

AdamW (Loshchilov and Hutter, arXiv 1711.05101) with betas 0.9 and 0.95 and weight decay 0.1 on
matrices, as GPT-3 (arXiv 2005.14165, appendix B); a tenth of the steps warm-up, then a cosine to a
tenth of the peak; gradients clipped to norm 1. Weights stay in float32; in bfloat16 the forward
pass runs under autocast.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from harness import checkpoint
from harness.ranks import Ranks

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP = 1.0
WARM_UP = 0.1  # of the steps
LAST_RATE = 0.1  # of the peak
BLOWN_UP = 1.5  # times the first loss: no run comes back from there
SMOOTHED = 20  # steps that a loss is averaged over before it counts as blown up

Batch = tuple[Tensor, Tensor]  # inputs and targets, each (B, T) int64


class Watched(NamedTuple):
    """What was seen between two steps."""

    step: int  # steps taken
    seconds: float  # of training, all that lies between its steps left out
    value: float


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how fast to train."""

    steps: int
    learning_rate: float  # at its peak
    bfloat16: bool = False
    watch_at: tuple[int, ...] = ()  # steps after which to look at the model
    stop_at: float | None = None  # a watched value from which on the run ends


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Where and how often a run is kept, and whose it is."""

    path: Path
    every_s: float
    written_by: str  # case, code and device: another's checkpoint is not continued


@dataclass
class Trained:
    """What a run has been so far."""

    losses: list[float] = field(default_factory=list)  # nats a target, before each step's update
    watched: list[Watched] = field(default_factory=list)
    seconds: float = 0.0
    resumed_at: list[int] = field(default_factory=list)  # steps at which it went on

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.losses)


def train(
    model: nn.Module,
    batch: Callable[[int], Batch],
    recipe: Recipe,
    *,
    ranks: Ranks,
    watch: Callable[[], float] | None = None,
    keeping: Keeping | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train a model in place.

    Args:
        model: gives an output with `logits` (B, T, V) for inputs (B, T).
        batch: that of a step, all ranks' together; the same step gives the same batch.
        recipe: steps, rate, and when to watch.
        ranks: this process's place among those that share the run; wraps the model.
        watch: looks at the model as it is now.
        keeping: where checkpoints go; the run continues from the one there.
        on_step: called after every step with the number of steps taken.

    Raises:
        FloatingPointError: the run diverged; the message says how and at which step.
        OSError: a checkpoint cannot be written.
    """
    decayed = _decayed(model)  # now: weights that are cut up have lost their marks
    module = ranks.wrap(model)
    optimiser = _optimiser(model, decayed, recipe.learning_rate)
    run = _resumed(model, optimiser, keeping)
    kept_at = time.monotonic()
    while run.steps < recipe.steps and not _solved(run, recipe):
        start = time.perf_counter()
        loss = _step(module, optimiser, ranks.share(batch(run.steps)), recipe, run.steps, ranks)
        run.seconds += time.perf_counter() - start
        run.losses.append(loss)
        _check(run)
        if watch is not None and run.steps in recipe.watch_at:
            value = watch()
            if not math.isfinite(value):  # the last step's update is in no loss
                raise FloatingPointError(f"{value} was seen after step {run.steps}")
            run.watched.append(Watched(run.steps, run.seconds, value))
        due = keeping is not None and time.monotonic() - kept_at >= keeping.every_s
        if ranks.agree(due) and keeping is not None:
            _keep(model, optimiser, run, keeping, ranks)
            kept_at = time.monotonic()
        on_step(run.steps)
    return run


def rate(step: int, recipe: Recipe) -> float:
    """The learning rate of a step, counted from 0."""
    warm_up = max(1, round(WARM_UP * recipe.steps))
    if step < warm_up:
        return recipe.learning_rate * (step + 1) / warm_up
    turn = math.cos(math.pi * (step - warm_up) / max(1, recipe.steps - warm_up))
    return recipe.learning_rate * (LAST_RATE + (1 - LAST_RATE) * (1 + turn) / 2)


def seeded(*numbers: int) -> torch.Generator:
    """A generator whose draws depend on all of some whole numbers below 2^32, and their order."""
    import numpy as np

    state = np.random.SeedSequence(numbers).generate_state(2)
    return torch.Generator().manual_seed((int(state[0]) << 31) ^ int(state[1]))


def autocast(device: str, bfloat16: bool) -> torch.autocast:
    """The context of a forward pass."""
    return torch.autocast(device, torch.bfloat16, enabled=bfloat16)


def nats(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in float32 of logits (B, T, V), where targets (B, T) are not -100."""
    flat = logits.flatten(0, 1).float()
    return cross_entropy(flat, targets.flatten(), reduction=reduction)


def _step(
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    recipe: Recipe,
    step: int,
    ranks: Ranks,
) -> float:
    """One step of training; the loss before it, over all ranks."""
    inputs, targets = (part.to(ranks.device, non_blocking=True) for part in batch)
    for group in optimiser.param_groups:
        group["lr"] = rate(step, recipe)
    optimiser.zero_grad(set_to_none=True)
    with autocast(ranks.device_type, recipe.bfloat16):
        logits = module(inputs).logits
    # The mean over all ranks' targets, which need not be as many in each.
    loss = ranks.count * nats(logits, targets, "sum") / ranks.total(targets.ge(0).sum())
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), CLIP)
    optimiser.step()
    return float(ranks.total(loss.detach())) / ranks.count


def _decayed(model: nn.Module) -> set[str]:
    """The names of what decays: matrices, but not those that are marked."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not getattr(parameter, "_no_weight_decay", False)
    }


def _optimiser(
    model: nn.Module, decayed: Collection[str], learning_rate: float
) -> torch.optim.AdamW:
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if name in decayed], "weight_decay": WEIGHT_DECAY},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=BETAS)


def _solved(run: Trained, recipe: Recipe) -> bool:
    return bool(
        recipe.stop_at is not None and run.watched and run.watched[-1].value >= recipe.stop_at
    )


def _check(run: Trained) -> None:
    """FloatingPointError for a run that has left the numbers, or all sense."""
    loss = run.losses[-1]
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {run.steps}")
    recent = run.losses[-SMOOTHED:]
    if len(recent) == SMOOTHED and sum(recent) / SMOOTHED > BLOWN_UP * run.losses[0]:
        raise FloatingPointError(
            f"the loss grew from {run.losses[0]:.3g} to {sum(recent) / SMOOTHED:.3g} nats by step "
            f"{run.steps}"
        )


def _resumed(
    model: nn.Module, optimiser: torch.optim.Optimizer, keeping: Keeping | None
) -> Trained:
    """The run that a checkpoint holds, its weights restored; a new one where there is none."""
    found = None if keeping is None else checkpoint.read(keeping.path, keeping.written_by)
    if found is None:
        return Trained()
    tensors, about = found
    checkpoint.restore(model, optimiser, tensors)
    losses = tensors["losses"].tolist()
    watched = [Watched(*entry) for entry in about["watched"]]
    return Trained(losses, watched, about["seconds"], [*about["resumed_at"], len(losses)])


def _keep(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    run: Trained,
    keeping: Keeping,
    ranks: Ranks,
) -> None:
    tensors = checkpoint.tensors_of(model, optimiser)
    tensors["losses"] = torch.tensor(run.losses, dtype=torch.float64)
    about = {
        "written_by": keeping.written_by,
        "watched": run.watched,
        "seconds": run.seconds,
        "resumed_at": run.resumed_at,
    }
    if ranks.rank == 0:
        checkpoint.write(keeping.path, tensors, about)
