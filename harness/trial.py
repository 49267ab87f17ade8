"""One training run of a cell: what every kind of it needs of its place and reports of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import archs
from archs.block import train_flops
from harness import memory, timing
from harness.ranks import Ranks
from harness.record import Case
from harness.sizes import model_of, shape_of
from harness.training import Keeping, Trained

Metrics = dict[str, Any]
Samples = dict[str, list[float]]


def _silent(share: float) -> None:
    """Report nothing."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run trains.

    Attributes:
        ranks: the processes that share it.
        keeping: where its checkpoint lies; None: it is not kept.
        on_progress: called with the share of it that is done.
    """

    ranks: Ranks
    keeping: Keeping | None = None
    on_progress: Callable[[float], None] = _silent


def measure(case: Case, place: Place) -> tuple[Metrics, Samples]:
    """Metrics and samples of a cell of kind loss or recall; errors as in `loss` and `recall`."""
    from harness import loss, recall

    kinds = {"loss": loss.measure, "recall": recall.measure}
    return kinds[case.kind](case, place)


def build_model(
    case: Case, vocab_size: int, max_len: int, device: torch.device | str
) -> archs.LanguageModel:
    """The model of a case in float32, its weights drawn from the seed, alike on every device."""
    shape = shape_of(case.arch, case.size, vocab_size, case.options.get("block"))
    return model_of(case, shape, vocab_size, max_len).to(device)


def accounted(model: archs.LanguageModel, case: Case) -> dict[str, int]:
    """Parameters, state bytes of a sequence at the trained length, and FLOPs of a step."""
    length = case.seq_len or 0
    return {
        "params": model.parameter_count(),
        "state_bytes": model.state_bytes(1, length),
        "step_flops": train_flops(model.forward_flops(case.batch, length)),
    }


def observed(run: Callable[[], Trained], place: Place) -> tuple[Trained, Metrics]:
    """Do a run; peak memory above what was held before, and what others did meanwhile."""
    found: list[Trained] = []
    cpu, start = timing.cpu_seconds(), time.perf_counter()
    peak = memory.peak(lambda: found.append(run()), place.ranks.device_type)
    load = timing.foreign_load(cpu, time.perf_counter() - start)
    return found[0], {
        "peak_bytes": peak.bytes,
        "peak_source": peak.source,
        "foreign_load": load if place.ranks.count == 1 else None,
    }
