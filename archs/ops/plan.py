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
    measured. On a CPU (in Triton's interpreter) as for an H100.

    Args:
        programs: how many run side by side in one pass.
        tokens: T.
        device: where the kernels run.
    """
    device = torch.device(device)
    multiprocessors = H100_MULTIPROCESSORS
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    if programs >= multiprocessors:
        return Plan(1)
    return Plan(max(1, min(-(-PROGRAMS * multiprocessors // programs), tokens // FEWEST_TOKENS)))
