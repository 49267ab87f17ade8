"""How every operation launches its Triton kernels."""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def on_its_device(launch: Callable[..., Result]) -> Callable[..., Result]:
    """`launch` with the GPU of its first argument as the current one, where kernels go."""

    @wraps(launch)
    def launched(x: Tensor, *args: object) -> Result:
        with torch.cuda.device_of(x):
            return launch(x, *args)

    return launched


def tf32_is_allowed() -> bool:
    """Whether products of float32 may round their operands, by PyTorch's own setting for them."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
