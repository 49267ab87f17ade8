"""The sequence operations under the architectures, each with interchangeable backends.

Every module `X` here holds one operation: `X_step` (the recurrence, one token), `X_reference`
(its fold over the sequence: the definition, exact in float64), `X_torch` (vectorised PyTorch) and
`X` (calls exactly the backend asked for). `X_kernel` holds its Triton kernels or, where they have
modules of their own, what launches them; it is imported only where they are asked for.
"""

import functools
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, get_args

import torch

import archs.ops

Backend = Literal["reference", "torch", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class BackendUnavailableError(RuntimeError):
    """The backend asked for cannot run this operation here; the message says why."""


def no_such_backend(operation: str, backend: str) -> Exception:
    """The exception to raise when `operation` has no `backend`: unknown, or not built yet."""
    if backend in BACKENDS:
        return BackendUnavailableError(
            f"{operation}: backend {backend!r} is not built yet; use 'torch' or 'reference'"
        )
    close = get_close_matches(backend, BACKENDS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ValueError(
        f"{operation}: unknown backend {backend!r}, expected one of {', '.join(BACKENDS)}{hint}"
    )


def kernels(operation: str, x: torch.Tensor) -> ModuleType:
    """The module of an operation's Triton kernels, for main inputs like x.

    Raises:
        BackendUnavailableError: they cannot run on x here.
    """

    def refusal(reason: str) -> BackendUnavailableError:
        return BackendUnavailableError(f"{operation}: backend 'triton' {reason}")

    try:
        import triton  # noqa: F401
    except ImportError:
        raise refusal("needs Triton, which runs on Linux: pip install triton") from None
    if x.dtype not in KERNEL_DTYPES:
        raise refusal(f"has no kernels in {str(x.dtype).removeprefix('torch.')}; use 'torch'")
    if interpreted():
        if x.dtype == torch.bfloat16:
            raise refusal(
                "in Triton's interpreter computes bfloat16 wrongly; use float32 or float16 there"
            )
    elif not has_gpu(x):
        raise refusal(
            f"needs an NVIDIA GPU, and x is on {x.device}; use 'torch', or set TRITON_INTERPRET=1 "
            "before Python starts, to try kernels slowly, untimed, on a CPU"
        )
    _load(operation)
    return getattr(archs.ops, f"{operation}_kernel")


def in_its_own_types(operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation, or part of a block, whose types autocast leaves alone.

    What it computes in float32 for the sake of its result would be in 16 bits else. One of its
    arguments is a tensor.
    """

    @functools.wraps(operation)
    def called(*arguments: Any, **options: Any) -> Any:
        tensors = (x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor))
        device = next(tensors).device.type
        # PyTorch refuses to say it of devices that have no autocast, as meta.
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return operation(*arguments, **options)
        with torch.autocast(device, enabled=False):
            return operation(*arguments, **options)

    return called


def has_gpu(x: torch.Tensor) -> bool:
    """Whether compiled kernels can be launched on x."""
    return x.is_cuda


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for its compiler: TRITON_INTERPRET is set."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return knobs.runtime.interpret


def _load(operation: str) -> None:
    import_module(f"archs.ops.{operation}_kernel")


# `torch.compile` cannot trace what these two do, and need not: their results do not change. This is
# all that `torch.compiler.assume_constant_result` does once it has spent 2 s on its imports.
for function in (interpreted, _load):
    function._dynamo_marked_constant = True
del function
