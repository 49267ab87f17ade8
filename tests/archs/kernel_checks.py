"""What the tests of every operation's Triton kernels share."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU: kernels are compiled")
on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="no GPU here")
LENGTHS = (1, 2, 3, 4, 17, 63, 64, 65, 127, 1000, 1025)

# Relative RMS errors that a kernel does not exceed, however wrong plain PyTorch is.
CAPS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
# A sum's last bits are luck: plain PyTorch may hit the exact value, and a kernel need not. Where
# there are few numbers, all of them may be small sums of large terms.
LUCK = 8  # units in the last place
FEW, LUCK_OF_FEW = 64, 128

# Wider than what a block without its mask would reach, and a multiple of every alignment.
MARGIN_BYTES = 4096
POISON = 0xFF  # in every byte: NaN in every floating type, -1 in integers
ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def relative_rms(got: Tensor, exact: Tensor, terms: Tensor | None = None) -> float:
    """Relative to `exact`, or to `terms` where these are larger; 0 where all are zero."""
    scale = max(rms(exact), 1e-300 if terms is None else rms(terms), 1e-300)
    return rms(got.double() - exact) / scale


def relative_max(got: Tensor, exact: Tensor, terms: Tensor | None = None) -> float:
    """The largest error over the largest value or term; 0 where all are zero."""
    sizes = [x.abs().max().item() for x in (exact, terms) if x is not None]
    return (got.double() - exact).abs().max().item() / max(*sizes, 1e-300)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_as_exact(
    got: Tensor,
    plain: Tensor,
    exact: Tensor,
    factor: float,
    name: str,
    dtype: torch.dtype | None = None,
    terms: Tensor | None = None,
) -> None:
    """A kernel's error is at most `factor` times that of plain PyTorch in the same type.

    `dtype` is that of the main inputs, where a result in a wider type has their rounding in it;
    `terms` is what the result is a difference of, where that may vanish.
    """
    dtype = dtype or got.dtype
    assert got.dtype == plain.dtype, name
    assert got.shape == plain.shape == exact.shape, name
    few = got.numel() < FEW
    luck = (LUCK_OF_FEW if few else LUCK) * torch.finfo(dtype).eps
    error, allowed = (relative_rms(x, exact, terms) for x in (got, plain))
    assert error <= factor * allowed + luck, (name, error, allowed)
    assert few or error <= CAPS[dtype], (name, error)
    error, allowed = (relative_max(x, exact, terms) for x in (got, plain))
    assert error <= factor * allowed + luck, (name, "max", error, allowed)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To the last bit, by name."""
    assert got.keys() == expected.keys()
    for name in got:
        assert torch.equal(got[name], expected[name]), name


@contextmanager
def guarded_allocations() -> Iterator[None]:
    """Meanwhile `torch.empty` and its kin return NaN, and nobody may write beside it.

    Raises:
        AssertionError: afterwards, where memory beside an allocation was written.
    """
    guarded: list[Tensor] = []

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args, **kwargs) -> Tensor:
            like = args[0] if args and isinstance(args[0], Tensor) else None
            device = kwargs.get("device") or ("cpu" if like is None else like.device)
            meta = original(*args, **{**kwargs, "device": "meta"})
            if meta.numel() == 0:
                return original(*args, **kwargs)
            tensor = _between_margins(meta, device)
            guarded.append(tensor)
            return tensor

        return allocate

    with ExitStack() as stack:
        for owner, name in ALLOCATORS:
            stack.enter_context(patch.object(owner, name, poisoned(getattr(owner, name))))
        yield
    for tensor in guarded:
        memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        memory.set_(tensor.untyped_storage())
        assert (memory[:MARGIN_BYTES] == POISON).all(), f"written before {tuple(tensor.shape)}"
        assert (memory[-MARGIN_BYTES:] == POISON).all(), f"written behind {tuple(tensor.shape)}"


def in_margins(x: Tensor) -> Tensor:
    """A copy of x, of the same strides, with NaN before and behind it and in its gaps."""
    return _between_margins(x, x.device).copy_(x)


def _between_margins(like: Tensor, device: torch.device | str) -> Tensor:
    sizes = zip(like.shape, like.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in sizes)
    size_bytes = elements * like.element_size()
    memory = torch.full((size_bytes + 2 * MARGIN_BYTES,), POISON, dtype=torch.uint8, device=device)
    inside = memory[MARGIN_BYTES : MARGIN_BYTES + size_bytes].view(like.dtype)
    return inside.as_strided(like.shape, like.stride(), inside.storage_offset())
