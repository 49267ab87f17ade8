"""Small Triton kernels whose traffic is known, and the calls that are counted by test_traffic.py.

Run as a program under TRITON_INTERPRET=1: prints what was counted of each call as JSON.
"""

import json

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from harness import traffic
from harness.tally import document

N = 1000  # no multiple of the block
BLOCK = 256


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n), at < n)


@triton.jit
def copy_reading_twice(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n) + tl.load(x + at, at < n), at < n)


@triton.jit
def neighbours(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(x + at - 1, (at < n) & (at > 0), 0.0)
    tl.store(y + at, tl.load(x + at, at < n) + before, at < n)


@triton.jit
def every_eighth(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + 8 * at, at < n), at < n)


@triton.jit
def histogram(x, bins, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(bins + at % 8, tl.load(x + at, at < n), at < n)


@triton.jit
def swap_once(lock):
    tl.atomic_cas(lock, 0, 1)


@triton.jit
def add_in_place(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, at < n) + 1, at < n)


@triton.jit
def transpose(x, y, M: tl.constexpr, K: tl.constexpr):
    rows = tl.make_tensor_descriptor(x, [M, K], [K, 1], [16, 16])
    columns = tl.make_tensor_descriptor(y, [K, M], [M, 1], [16, 16])
    i, j = tl.program_id(0) * 16, tl.program_id(1) * 16
    columns.store([j, i], rows.load([i, j]).T)


@triton.jit
def copy_tile(x, y):
    y.store([0, 0], x.load([0, 0]))


@triton.jit
def product(a, b, c, K: tl.constexpr, PRECISION: tl.constexpr):
    at, k = tl.arange(0, 16), tl.arange(0, K)
    left = tl.load(a + at[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * 16 + at[None, :])
    y = tl.exp2(tl.dot(left, right, input_precision=PRECISION))
    tl.store(c + at[:, None] * 16 + at[None, :], y)


@triton.jit
def product_in_bfloat16(a, c):
    at = tl.arange(0, 16)
    x = tl.load(a + at[:, None] * 16 + at[None, :]).to(tl.bfloat16)
    tl.store(c + at[:, None] * 16 + at[None, :], tl.dot(x, x))


@triton.jit
def reach_too_far(x, y):
    tl.store(y, tl.load(x + 100))


@triton.jit
def copy_in_steps(x, y, n, BLOCK: tl.constexpr):
    """In the interpreter `step` is an int, and a mask formed with it holds integers."""
    for step in range(2):
        at = (2 * tl.program_id(0) + step) * BLOCK + tl.arange(0, BLOCK)
        mask = (step >= 0) & (at < n)
        tl.store(y + at, tl.load(x + at, mask), mask)


def blocks(n: int = N) -> tuple[int]:
    return (triton.cdiv(n, BLOCK),)


def on_lines(kernel, x, n=N):
    y = torch.zeros(n)
    kernel[blocks(n)](x, y, n, BLOCK=BLOCK)
    return y


def copy_through_torch():
    """A copy between two kernels that no kernel shows."""
    return on_lines(copy, on_lines(copy, torch.ones(N)).clone())


@torch.library.custom_op("traffic::copy_twice", mutates_args=())
def custom_operation(x: torch.Tensor) -> torch.Tensor:
    return on_lines(copy, on_lines(copy, x).clone())


def atomics():
    bins = torch.zeros(8)
    histogram[blocks()](torch.ones(N), bins, N, BLOCK=BLOCK)
    assert bins.tolist() == [N / 8] * 8
    swap_once[(3,)](torch.zeros(1, dtype=torch.int32))


def descriptors():
    x, y = torch.randn(32, 48), torch.empty(48, 32)
    transpose[(2, 3)](x, y, M=32, K=48)
    assert torch.equal(y, x.T)
    x, y = torch.randn(20, 16).half(), torch.zeros(16, 16).half()
    tile = [16, 16]
    copy_tile[(1,)](TensorDescriptor.from_tensor(x, tile), TensorDescriptor.from_tensor(y, tile))
    assert torch.equal(y, x[:16])


def dots():
    c = torch.zeros(16, 16)
    for dtype, precision in (
        (torch.float16, "tf32"),
        (torch.float32, "tf32"),
        (torch.float32, "ieee"),
    ):
        a, b = torch.zeros(16, 32, dtype=dtype), torch.zeros(32, 16, dtype=dtype)
        product[(1,)](a, b, c, K=32, PRECISION=precision)


def one_memory():
    """Two arguments that share memory, the second at an odd place in it."""
    both = torch.zeros(2 * N)
    copy[blocks()](both, both[N:], N, BLOCK=BLOCK)


def tensor_operations():
    x = torch.ones(10, 20)
    x.view(20, 10).T.unsqueeze(0).expand(5, 10, 20)  # views
    torch.empty_like(x)
    expanded = torch.ones(1, 20).expand(10, 20)
    x.add(expanded)  # 800 + 80 read, 800 written
    x.add_(x)  # 800 read once, 800 written
    x.copy_(expanded)  # 80 read, 800 written
    x.zero_()
    torch.mm(x, x.T)


CALLS = {
    "copy": lambda: on_lines(copy, torch.ones(N)),
    "copy twice": lambda: on_lines(copy, on_lines(copy, torch.ones(N))),
    "reading twice": lambda: on_lines(copy_reading_twice, torch.ones(N)),
    "neighbours": lambda: on_lines(neighbours, torch.ones(N)),
    "every eighth": lambda: on_lines(every_eighth, torch.ones(8 * N)),
    "in place": lambda: add_in_place[blocks()](torch.zeros(N), N, BLOCK=BLOCK),
    "atomics": atomics,
    "descriptors": descriptors,
    "dots": dots,
    "one memory": one_memory,
    "torch between": copy_through_torch,
    "custom operation": lambda: custom_operation(torch.ones(N)),
    "in steps": lambda: on_lines(copy_in_steps, torch.ones(N)),
    "torch alone": tensor_operations,
}
REFUSED = {
    "bfloat16": lambda: on_lines(copy, torch.ones(N, dtype=torch.bfloat16)),
    "bfloat16 inside": lambda: product_in_bfloat16[(1,)](torch.ones(16, 16), torch.ones(16, 16)),
    "outside": lambda: reach_too_far[(1,)](torch.ones(100), torch.ones(1)),
}


def main() -> None:
    counted = {name: document(traffic.count(call)[1]) for name, call in CALLS.items()}
    refused = {}
    for name, call in REFUSED.items():
        try:
            traffic.count(call)
        except Exception as error:
            # The interpreter wraps what is raised inside a kernel.
            refused[name] = f"{type(error).__name__}: {error} {error.__cause__!r}"
    print(json.dumps({"counted": counted, "refused": refused}))


if __name__ == "__main__":
    main()
