"""The cells of `seqscale check` as benchmarks.

`pytest tests/benchmarks --benchmark-json FILE` times them, and `seqscale check --from FILE ...`
judges such files; pytest-benchmark's own comparison lets a removed benchmark and one that is no
number pass.
"""

import pytest
import torch

from harness import guards, measured

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", guards.names(DEVICE))
def test_speed(benchmark, name):
    measured.benchmarked(benchmark, name, DEVICE)
