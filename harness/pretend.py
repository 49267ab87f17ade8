"""Stand-ins for a GPU on a machine without one, for code that asks about it before it launches."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

import archs.ops
from harness.compiled import MULTIPROCESSORS, Target, tile_size

# Multiprocessors, L2 and memory of A100 SXM, H100 SXM and B200 (NVIDIA's architecture papers).
PROPERTIES = {
    80: (108, 40 << 20, 80 << 30),
    90: (132, 50 << 20, 80 << 30),
    100: (148, 126 << 20, 180 << 30),
}
ARCHS = tuple(PROPERTIES)


@contextmanager
def gpu(arch: int) -> Iterator[None]:
    """Meanwhile `torch.cuda` and Triton describe a GPU of compute capability arch / 10.

    Nothing runs on it. A library that asks when it is imported should be imported meanwhile.

    Kernels' tensors stay on the CPU. Autotuned kernels have one configuration, that with the
    largest tiles: nothing can be timed, and it reads its inputs again least often.
    """
    from triton.runtime import driver

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
        "device_count": lambda: 1,
        "device": lambda *_: nullcontext(),
        "get_device_properties": lambda *_: described,
        "get_device_capability": lambda *_: capability,
        "get_device_name": lambda *_: described.name,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(driver, "_active", Target(arch)))
        stack.enter_context(_fla_answered(arch))
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


@contextmanager
def _fla_answered(arch: int) -> Iterator[None]:
    """Flash-linear-attention, where it is imported, asks for shared memory by a tensor's device.

    A tensor on the CPU has none, and an answer is kept for good.
    """
    hardware = sys.modules.get("fla.utils.hardware")
    if hardware is None:
        yield
        return
    answers = dict.fromkeys((None, 0), MULTIPROCESSORS[arch].shared_of_a_program)
    hardware.check_shared_mem.cache_clear()
    with patch.object(hardware, "get_all_max_shared_mem", lambda: answers):
        yield
    hardware.check_shared_mem.cache_clear()
