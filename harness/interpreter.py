"""Triton's interpreter, faster: its language is prepared once a launch.

By itself it prepares the language again in every call of a helper inside a kernel, which is most of
its time where tiles are small.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def prepared_once() -> Iterator[None]:
    """Meanwhile kernels are interpreted to the same bits, with many helpers twice as fast.

    Where a version of Triton has no such function, nothing changes.
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
