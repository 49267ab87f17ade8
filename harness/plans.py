"""Which variants of their Triton kernels the operations choose.

An operation that has variants has a function `plan` in its module of `archs.ops`: of a shape, of a
type where that matters, and of a device, a named tuple. Its Triton path looks it up there whenever
it is called, so that it can be listened to.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import archs.ops

Plans = dict[str, list[dict[str, Any]]]  # by operation, each once


@contextmanager
def recorded(chosen: Plans) -> Iterator[None]:
    """Add what is planned meanwhile to `chosen`. It costs a call: time nothing within."""
    modules = _planning()
    real = {name: module.plan for name, module in modules.items()}
    for name, module in modules.items():
        vars(module)["plan"] = _recording(name, real[name], chosen)
    try:
        yield
    finally:
        for name, module in modules.items():
            vars(module)["plan"] = real[name]


def _planning() -> dict[str, ModuleType]:
    """The modules of the operations that have variants, by operation."""
    names = [m.name for m in iter_modules(archs.ops.__path__) if not m.name.endswith("_kernel")]
    modules = {name: import_module(f"archs.ops.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "plan")}


def _recording(operation: str, plan: Callable[..., Any], chosen: Plans) -> Callable[..., Any]:
    def recording(*arguments: Any, **options: Any) -> Any:
        found = plan(*arguments, **options)
        said = chosen.setdefault(operation, [])
        if found._asdict() not in said:
            said.append(found._asdict())
        return found

    return recording
