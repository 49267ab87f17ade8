"""Triton's language is prepared once a launch, and kernels compute what they did."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime import interpreter

from harness.interpreter import convertible_loop_variables, prepared_once

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: kernels are compiled"
)


@triton.jit
def squared(x):
    return x * x


@triton.jit
def squared_twice(x):
    return squared(squared(x))


@triton.jit
def kernel(X, Y, WRONG: tl.constexpr, n: tl.constexpr):
    offsets = tl.arange(0, n)
    x = tl.load(X + offsets)
    if WRONG:
        x = tl.dot(x, x)
    tl.store(Y + offsets, squared_twice(x) + tl.program_id(0))


def launch(wrong=False):
    x = torch.arange(16.0)
    y = torch.empty_like(x)
    kernel[(3,)](x, y, WRONG=wrong, n=16)
    return x, y


def test_the_language_is_prepared_once_a_launch_and_restored(monkeypatch):
    calls, prepare, original = [], interpreter._patch_lang, tl.load
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: calls.append(fn) or prepare(fn))
    with prepared_once():
        for launches in (1, 2):
            x, y = launch()
            assert torch.equal(y, x**4 + 2)
            assert len(calls) == launches
            assert tl.load is original


def test_a_launch_after_one_that_failed_is_prepared():
    with prepared_once():
        with pytest.raises(interpreter.InterpreterError):
            launch(wrong=True)
        x, y = launch()
        assert torch.equal(y, x**4 + 2)


def test_contexts_nest():
    with prepared_once(), prepared_once():
        x, y = launch()
    assert torch.equal(y, x**4 + 2)


def test_another_triton_is_left_alone(monkeypatch):
    monkeypatch.delattr(interpreter, "_patch_lang")
    with prepared_once():
        assert not hasattr(interpreter, "_patch_lang")


@triton.jit
def summing_kernel(Y, n):
    total = 0
    for i in range(tl.cdiv(n, 2)):
        total += i.to(tl.int64) * 2
    tl.store(Y, total)


def test_a_loop_variable_is_converted_as_on_a_gpu():
    y = torch.empty(1, dtype=torch.int64)
    with convertible_loop_variables(summing_kernel.fn):
        summing_kernel[(1,)](y, 9)
    assert y.item() == 2 * (0 + 1 + 2 + 3 + 4)
    assert "range" not in globals()
