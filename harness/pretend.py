"""Stand-ins for a GPU on a machine without one, for code that asks about it before it launches."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

import archs.ops

# Multiprocessors, L2 and memory of A100 SXM, H100 SXM and B200 (NVIDIA's architecture papers).
PROPERTIES = {
    80: (108, 40 << 20, 80 << 30),
    90: (132, 50 << 20, 80 << 30),
    100: (148, 126 << 20, 180 << 30),
}
ARCHS = tuple(PROPERTIES)


@contextmanager
def gpu(arch: int) -> Iterator[None]:
    """Meanwhile `torch.cuda` describes a GPU of compute capability arch / 10; nothing runs on it.

    Kernels' tensors stay on the CPU. Autotuned kernels have one configuration, that with the
    largest tiles: nothing can be timed, and it reads its inputs again least often.
    """
    multiprocessors, l2_bytes, memory = PROPERTIES[arch]
    capability = divmod(arch, 10)
    described = SimpleNamespace(
        name=f"sm_{arch}",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=multiprocessors,
        L2_cache_size=l2_bytes,
        total_memory=memory,
        warp_size=32,
    )
    answers = {
        "device": lambda *_: nullcontext(),
        "get_device_properties": lambda *_: described,
        "get_device_capability": lambda *_: capability,
        "get_device_name": lambda *_: described.name,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(archs.ops, "has_gpu", lambda x: True))
        stack.enter_context(_one_configuration())
        yield


@contextmanager
def _one_configuration() -> Iterator[None]:
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def run_one(self: Any, *args: Any, **kwargs: Any) -> Any:
        with patch.object(self, "configs", [max(self.configs, key=tile_size)]):
            return run(self, *args, **kwargs)

    with patch.object(Autotuner, "run", run_one):
        yield


def tile_size(config: Any) -> int:
    """The product of a configuration's tile sizes."""
    product = 1
    for value in config.kwargs.values():
        product *= value if isinstance(value, int) else 1
    return product
