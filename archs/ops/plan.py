"""Which variant of its Triton kernels an operation runs that walks a sequence with a state."""

from typing import NamedTuple

import torch

H100_MULTIPROCESSORS = 132
FEWEST_TOKENS = 1024  # in a segment
PROGRAMS = 4  # a multiprocessor, where there are segments


class Plan(NamedTuple):
    """Which variant of the Triton kernels runs."""

    segments: int = 1  # parts of the sequence that run side by side; 1: one pass


def segments_that_fill(programs: int, tokens: int, device: torch.device | str) -> Plan:
    """One pass where it has a program for each multiprocessor, else segments that make four.

    Segments read the sequence once more, so few are not worth it, nor short ones. Arithmetic, not
    measured.

    Args:
        programs: how many run side by side in one pass.
        tokens: T.
        device: where the kernels run.
    """
    available = multiprocessors(device)
    if programs >= available:
        return Plan(1)
    return Plan(max(1, min(-(-PROGRAMS * available // programs), tokens // FEWEST_TOKENS)))


def multiprocessors(device: torch.device | str) -> int:
    """Of a GPU; of a CPU, where Triton's interpreter runs, those of an H100."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return H100_MULTIPROCESSORS
