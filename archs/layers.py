"""Parts that at least two architectures share unchanged."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    Computed in float32 (float64 for float64 input) whatever the input's type, as Llama does.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., D); same type out."""
        y = nn.functional.rms_norm(
            x if x.dtype == torch.float64 else x.float(), (x.shape[-1],), eps=self.eps
        )
        return self.weight * y.to(x.dtype)
