"""Long convolution of tokens that come one by one, in O(log^2 T) a token on average.

Online ("relaxed") convolution, van der Hoeven 2002, "Relax, but don't be too lazy"; for decoding,
Oncescu et al. 2024, "Flash Inference" (arXiv 2410.12982). It computes what `long_conv_step` does,
with the sums over the past formed ahead in tiles. Once i tokens are read, with U the largest power
of two that divides i:

    pending[i : i+U] += the share of z[i-U : i] in these outputs               a tile
    y_t = post_gate_t * (pending_t + (filter_0 + skip) * z_t)                  with pending at t

Tokens s < t meet in exactly one tile: that of the i in s+1, ..., t with the most factors of two. A
tile reads taps 1 to 2U - 1; one of U tokens comes every 2U tokens. The mean is O(log^2 T), but the
token that completes the longest tile waits for all of it, O(T log T). A tile takes temporary memory
of about 6U numbers a channel.

After i tokens the outputs to come have met the tiles of i, of i without its lowest binary one, of
that without its lowest, and so on: at most log2(i) + 1 of them, which is all that reading a prompt
adds to `pending`. So it depends on what was read and how much, not on how that was split.
Computed in the type of `pending`.
Letters: B batch, D channels, U tokens of a tile, S room of a sequence. "..." may be further axes,
of convolutions beside each other.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from archs.ops import Backend, no_such_backend

# Longer tiles go by FFT. On two cores of a Xeon at width 256, product against FFT: 8 tokens
# 0.06 and 0.10 ms (8 rows: 0.19 and 0.45), 16 tokens 0.12 and 0.09 (0.29 and 0.65), 32 tokens 0.27
# and 0.12 (0.36 and 0.43), 64 tokens 0.79 and 0.15 (0.74 and 0.64).
DIRECT_TILE = 16


def long_conv_lazy_step(
    u: Tensor,
    tap: Tensor,
    pending: Tensor,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token, given its sum over the past: O(1). Its own share is for `add_tiles` to add.

    Args:
        u: (B, D).
        tap: (D,), the filter's tap of the current token.
        pending: (B, D), the sum over all earlier tokens, in float32 at least.
        pre_gate: (B, D).
        post_gate: (B, D).
        skip: (D,).

    Returns:
        y (B, D), and the new z (B, D) to append to the history, both in u's type.
    """
    compute = pending.dtype
    z = u.to(compute) if pre_gate is None else u.to(compute) * pre_gate.to(compute)
    own = tap.to(compute) if skip is None else tap.to(compute) + skip.to(compute)
    y = pending + own * z
    if post_gate is not None:
        y = y * post_gate.to(compute)
    return y.to(u.dtype), z.to(u.dtype)


def add_tiles(
    pending: Tensor,
    history: Tensor,
    start: int,
    tile_filters: Callable[[int], Tensor],
    *,
    backend: Backend,
) -> None:
    """Add to `pending` the tiles of the tokens from `start` on, in place.

    Args:
        pending: (..., B, D, S), after `start` tokens; zeros at first. What belongs to outputs up to
            the history's end is set to zero: they are past.
        history: (..., B, D, T), z of all T <= S tokens so far.
        start: tokens that `pending` has met.
        tile_filters: of a number of tokens U, what `tile_filter` returns for it.
        backend: "reference" and "torch" are the same here.

    Raises:
        BackendUnavailableError: the backend has no tiles.
        ValueError: an unknown backend, or a history shorter than `start` or longer than `pending`.
    """
    if backend not in ("reference", "torch"):
        raise no_such_backend("long_conv_lazy", backend)
    end, room = history.shape[-1], pending.shape[-1]
    if not start <= end <= room:
        raise ValueError(
            f"long_conv_lazy: a history of {end} tokens must be from start = {start} to the "
            f"{room} that pending has room for"
        )
    pending[..., start:end] = 0
    for stop, size in tiles(start, end):
        reach = min(stop + size, room)
        if reach > end:
            z = history[..., stop - size : stop].to(pending.dtype)
            shares = apply_tile(z, tile_filters(size))
            pending[..., end:reach] += shares[..., end - stop : reach - stop]


def tiles(start: int, end: int) -> Iterator[tuple[int, int]]:
    """End i and size U of the tiles between two positions that share in outputs from `end` on."""
    while end > start:
        size = end & -end
        yield end, size
        end -= size


def tile_filter(taps: Tensor, size: int) -> Tensor:
    """What `apply_tile` needs of a filter for tiles of `size` = U tokens.

    Args:
        taps: (..., D, L), the filter's taps from 0 on, of which the first 2U are read; those from
            L on count as zero.
        size: U, a power of two.

    Returns:
        Up to `DIRECT_TILE` tokens the Toeplitz matrices (..., D, U, U) from inputs to outputs, else
        the spectra (..., D, U + 1) of taps 0 to 2U - 1.
    """
    if size > DIRECT_TILE:
        return torch.fft.rfft(taps, 2 * size)
    token = torch.arange(size, device=taps.device)
    padded = F.pad(taps, (0, 2 * size - taps.shape[-1]))
    return padded[..., size + token[:, None] - token]


def apply_tile(z: Tensor, filter: Tensor) -> Tensor:
    """The share of z (..., B, D, U) in the next U sums (..., B, D, U), by a `tile_filter`."""
    size = z.shape[-1]
    if size <= DIRECT_TILE:
        return (filter @ z.movedim(-3, -1)).movedim(-1, -3)
    spectrum = torch.fft.rfft(z, 2 * size) * filter.unsqueeze(-3)
    return torch.fft.irfft(spectrum, 2 * size)[..., size:]
