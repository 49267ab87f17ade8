"""Triton kernels to compile: a matrix product as it should be, and ways to spoil it."""

import torch
import triton
import triton.language as tl

from harness.compiled import Compiled, compile_launches


@triton.jit
def product(
    a,
    b,
    c,
    n,
    M: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """C = A B in tiles of M x M, one program, over n columns of A."""
    at, k = tl.arange(0, M), tl.arange(0, K)
    total = tl.zeros((M, M), tl.float32)
    for start in range(0, n, K):
        left = tl.load(a + at[:, None] * n + (start + k)[None, :])
        right = tl.load(b + (start + k)[:, None] * M + at[None, :])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(c + at[:, None] * M + at[None, :], total)


@triton.jit
def product_without_dot(a, b, c, n, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """The same as sums of products: the tensor-core path dropped."""
    at = tl.arange(0, M)
    total = tl.zeros((M, M), tl.float32)
    for k in range(0, n):
        left, right = tl.load(a + at * n + k), tl.load(b + k * M + at)
        total += left.to(tl.float32)[:, None] * right.to(tl.float32)[None, :]
    tl.store(c + at[:, None] * M + at[None, :], total)


@triton.autotune(
    [
        triton.Config({"BLOCK": block}, num_warps=warps)
        for block, warps in ((1024, 4), (16384, 2), (16384, 4), (16384, 8), (256, 4))
    ],
    key=["n"],
)
@triton.jit
def tuned(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n) + 1, at < n)


@triton.autotune([triton.Config({"K": k}, num_warps=8) for k in (16, 64, 512)], key=["n"])
@triton.jit
def tuned_product(a, b, c, n, M: tl.constexpr, K: tl.constexpr):
    at, k = tl.arange(0, M), tl.arange(0, K)
    total = tl.zeros((M, M), tl.float32)
    for start in range(0, n, K):
        left = tl.load(a + at[:, None] * n + (start + k)[None, :])
        right = tl.load(b + (start + k)[:, None] * M + at[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + at[:, None] * M + at[None, :], total)


@triton.jit
def copy_by_descriptor(x, y, M: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [M, M], [M, 1], [64, 64])
    target = tl.make_tensor_descriptor(y, [M, M], [M, 1], [64, 64])
    target.store([0, 0], source.load([0, 0]))


def call(kernel="product", M=64, K=64, precision="tf32", dtype=torch.float16, warps=4, n=512):
    """Launch a product; of a result nothing is computed where launches are only compiled."""
    a, b = torch.zeros(M, n, dtype=dtype), torch.zeros(n, M, dtype=dtype)
    launch = globals()[kernel][(1,)]
    launch(a, b, torch.zeros(M, M), n, M=M, K=K, PRECISION=precision, num_warps=warps)


def rows(arch: int, calls: list[dict]) -> list[Compiled]:
    """What is compiled of several calls, each with its arguments of `call`."""
    return compile_launches(lambda: [call(**arguments) for arguments in calls], arch)


def rows_and_result(arch: int) -> tuple[list[Compiled], torch.Tensor]:
    """What is compiled of a product, and the memory that it would write, full of sevens."""
    a, c = torch.ones(64, 64), torch.full((64, 64), 7.0)
    found = compile_launches(lambda: product[(1,)](a, a, c, 64, M=64, K=64, PRECISION="tf32"), arch)
    return found, c


def rows_of_a_copy_by_descriptor(arch: int) -> list[Compiled]:
    x = torch.zeros(64, 64, dtype=torch.float16)
    return compile_launches(lambda: copy_by_descriptor[(1,)](x, x, M=64), arch)


def rows_of_tuned(arch: int) -> tuple[list[Compiled], list[int]]:
    """What is compiled of an autotuned kernel, and the tiles it has afterwards."""
    found = compile_launches(lambda: tuned[(1,)](torch.ones(9), torch.ones(9), 9), arch)
    return found, [c.kwargs["BLOCK"] for c in tuned.configs]


def rows_of_a_tuned_product(arch: int) -> list[Compiled]:
    a, c = torch.ones(128, 1024, dtype=torch.float16), torch.ones(128, 128)
    return compile_launches(lambda: tuned_product[(1,)](a, a, c, 1024, M=128), arch)
