"""Checkpoints of a training run: one safetensors file, replaced as a whole.

It holds all that the rest of the run depends on, to the last bit: weights, the optimiser's moments,
and what has been recorded so far. Batches follow from seed and step, so no generator is among it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from harness.record import replacing

MOMENTS = ("exp_avg", "exp_avg_sq")  # of torch.optim.AdamW


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Replace `path`: after a crash at any moment it holds all of the old checkpoint or the new.

    Raises:
        OSError: disk full or no permission; no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = save(dict(tensors), {"about": json.dumps(about, allow_nan=False)})
    with replacing(path) as file:
        file.write(data)


def read(path: Path, written_by: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors of a checkpoint and what is said about them, or None where there is none to use.

    One that is damaged, or that other code or another device wrote, is none: the run starts anew.

    Args:
        path: of the file.
        written_by: must equal what the checkpoint says about itself under "written_by".
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            if about["written_by"] != written_by:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, KeyError, ValueError, TypeError, RecursionError):
        return None


def tensors_of(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name, whole and on the CPU; collective where weights are cut up.

    Parameters that no gradient has reached have no moments.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        found[f"weight.{name}"] = _whole(parameter)
        for moment, value in optimiser.state.get(parameter, {}).items():
            found[f"{moment}.{name}"] = _whole(value)
    return found


def restore(
    module: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put weights and moments back where `tensors_of` took them."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(_like(tensors[f"weight.{name}"], parameter))
            if f"step.{name}" not in tensors:
                continue
            optimiser.state[parameter] = {
                "step": tensors[f"step.{name}"].clone(),
                **{
                    moment: _like(tensors[f"{moment}.{name}"], parameter).clone()
                    for moment in MOMENTS
                },
            }


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor where, and cut up as, a parameter is."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
