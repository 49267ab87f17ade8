"""How a measured quantity grows with sequence length."""

from collections.abc import Sequence

import numpy as np


def local_exponents(lengths: Sequence[float], values: Sequence[float]) -> list[float]:
    """The slope d log(value) / d log(length) between each pair of neighbouring lengths.

    Raises:
        ValueError: lengths not strictly increasing, or a length or value not positive.
    """
    x, y = np.asarray(lengths, dtype=float), np.asarray(values, dtype=float)
    if x.shape != y.shape or np.any(np.diff(x) <= 0):
        raise ValueError("lengths must increase strictly and match the values one to one")
    if np.any(x <= 0) or not np.all(y > 0):
        raise ValueError("lengths and values must be positive")
    return [float(e) for e in np.diff(np.log(y)) / np.diff(np.log(x))]
