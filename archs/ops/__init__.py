"""The sequence operations under the architectures, each with interchangeable backends.

Every module `X` here holds one operation: `X_step` (the recurrence, one token), `X_reference`
(its fold over the sequence: the definition, exact in float64), `X_torch` (vectorised PyTorch) and
`X` (calls exactly the backend asked for).
"""

from difflib import get_close_matches
from typing import Literal, get_args

Backend = Literal["reference", "torch", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)


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
