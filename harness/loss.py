"""Training runs on real bytes: the loss of each step, in bits a byte."""

import math
import time
from dataclasses import dataclass

import torch
from torch import nn

from archs.model import LanguageModel
from harness.data import Corpus


@dataclass(frozen=True)
class TrainingRun:
    """What a training run left behind."""

    train_bits_per_byte: list[float]  # before each step's update
    validation_bits_per_byte: float  # after the last step
    seconds: float  # training alone


def train(
    model: LanguageModel,
    corpus: Corpus,
    *,
    steps: int,
    batch: int,
    seq_len: int,
    learning_rate: float,
    seed: int = 0,
    validation_batches: int = 4,
) -> TrainingRun:
    """Train with AdamW, a tenth of the steps warm-up, then cosine to a tenth; gradients clipped.

    Weight decay 0.1 acts on matrices only, and not on parameters marked `_no_weight_decay`.
    The same seed gives every model the same batches.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1 and not _spared(p)]
    others = [p for p in model.parameters() if p.ndim <= 1 or _spared(p)]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
    )
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: (
            (step + 1) / warm_up
            if step < warm_up
            else 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))
        ),
    )
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(steps):
        loss = bits_per_byte(model, *corpus.batch(batch, seq_len, generator))
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    generator.manual_seed(seed + 1)
    with torch.no_grad():
        held_out = [
            bits_per_byte(model, *corpus.batch(batch, seq_len, generator, validation=True)).item()
            for _ in range(validation_batches)
        ]
    return TrainingRun(losses, sum(held_out) / len(held_out), seconds)


def bits_per_byte(
    model: LanguageModel, inputs: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of the next byte in bits; inputs and targets (B, T)."""
    device = model.head.weight.device
    logits = model(inputs.to(device)).logits
    nats = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.to(device).flatten())
    return nats / math.log(2)


def _spared(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_no_weight_decay", False)
