import os
import platform
from collections.abc import Iterator
from importlib.util import find_spec

# For a large array NumPy asks for huge pages, and whatever lies there later, in another test, takes
# memory in whole ones: its peak would not be its own. NumPy reads this as it is imported.
os.environ["NUMPY_MADVISE_HUGEPAGE"] = "0"
# The interpreter's products are NumPy's, whose BLAS on many processors sums in an order that hangs
# on the shape: tiles of two sizes would give one logit two values, which no GPU does. This one sums
# term by term.
if platform.machine() == "x86_64":
    os.environ["OPENBLAS_CORETYPE"] = "Sandybridge"

import pytest
import torch

from harness.interpreter import prepared_once

# The tensors here are small: more threads only wait for each other, and pytest-xdist's workers
# use the cores.
torch.set_num_threads(1)

# Without a GPU our Triton kernels run in the interpreter, which must be chosen before they are
# imported. Tests that compile kernels do so in processes of their own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def faster_interpreter() -> Iterator[None]:
    if find_spec("triton") is None:
        yield
        return
    with prepared_once():
        yield
