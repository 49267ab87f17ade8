"""Triton's interpreter, faster and closer to Triton's language."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def prepared_once() -> Iterator[None]:
    """Meanwhile kernels are interpreted to the same bits, with many helpers twice as fast.

    By itself the interpreter prepares Triton's language again in every call of a helper inside a
    kernel, which is most of its time where tiles are small. Where a version of Triton has no such
    function, nothing changes.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    prepare: Any = getattr(interpreter, "_patch_lang", None)
    prepared: set[int] = set()

    def once(function: Any) -> Any:
        languages = {id(v) for v in function.__globals__.values() if v is tl or v is tl.core}
        if prepared >= languages:
            return None  # a helper's, which nobody looks at
        scope = prepare(function)
        if not prepared:  # the launch itself, which undoes what it prepared
            restore = scope.restore

            def restored() -> None:
                prepared.clear()
                restore()

            scope.restore = restored
        prepared.update(languages)
        return scope

    if prepare is None:
        yield
        return
    with patch.object(interpreter, "_patch_lang", once):
        yield


class _LoopVariable(int):
    def to(self, dtype: Any) -> "_LoopVariable":
        return self  # Python's integers do not overflow


@contextmanager
def convertible_loop_variables(kernel: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile the kernel may write `i.to(tl.int64)` of the variable i of `for i in range(n)`.

    On a GPU the variable is a scalar of Triton's; in the interpreter it is an integer of Python's,
    which has no such method.
    """

    def convertible_range(*bounds: Any) -> Iterator[_LoopVariable]:
        return map(_LoopVariable, range(*bounds))

    module = sys.modules[kernel.__module__]
    with patch.object(module, "range", convertible_range, create=True):
        yield
