"""Library implementations of the same operations, for side-by-side runs; each loaded lazily."""

import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from torch import Tensor

INSTALL_MAMBA_SSM = (
    "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "
    "pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1"
)


class PeerUnavailableError(ImportError):
    """A library to compare with is not installed; the message says how to install it."""


@cache
def ssd_minimal_discrete() -> Callable[..., tuple[Tensor, Tensor]]:
    """Listing 1 of the Mamba-2 paper (arXiv 2405.21060), as mamba-ssm ships it.

    Returns:
        A function (X, A, B, C, block_len, initial_states=None) -> (Y, final_state): X (B, T, H, P)
        already multiplied by dt; A (B, T, H), the log-decay; B and C (B, T, H, N); initial_states
        (B, 1, H, P, N); final_state (B, H, P, N); T a multiple of block_len.

    Raises:
        PeerUnavailableError: mamba-ssm is not installed.
    """
    package = find_spec("mamba_ssm")
    if package is None or not package.submodule_search_locations:
        raise PeerUnavailableError(f"mamba-ssm is not installed; run: {INSTALL_MAMBA_SSM}")
    path = Path(package.submodule_search_locations[0], "modules", "ssd_minimal.py")
    # Importing the package needs its CUDA extension, so the file is executed by itself. It takes
    # one kernel from the package, which only its self-test calls.
    stand_in = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    stand_in.mamba_chunk_scan_combined = None  # type: ignore[attr-defined]
    spec = spec_from_file_location("mamba_ssm_ssd_minimal", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    before = sys.modules.get(stand_in.__name__)
    sys.modules[stand_in.__name__] = stand_in
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[stand_in.__name__]
        if before is not None:
            sys.modules[stand_in.__name__] = before
    return module.ssd_minimal_discrete
