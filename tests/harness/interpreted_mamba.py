"""mamba-ssm's own kernels in Triton's interpreter, called as a block calls our operation.

Prints the largest relative error of outputs, state and gradients against ours. A process of its
own: the interpreter cannot be turned off again.
"""

import contextlib
import os
import types

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import torch
import torch.nn.functional as F
from triton.runtime.autotuner import Autotuner

from archs.ops.ssd import ssd
from harness.correctness import relative_error
from harness.peers import PEERS

# What the library asks a GPU for around its launches.
torch.cuda.device = lambda *_: contextlib.nullcontext()
torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=1)
Autotuner._bench = lambda *_, **__: [1.0] * 3  # nothing to choose from: any configuration


def results(operation):
    """Y, state, and the gradients of what a block forms the operation's inputs of."""
    torch.manual_seed(0)
    B, T, H, P, N = 1, 70, 2, 32, 16
    shapes = ((H,), (B, T, H), (B, T, H, P), (B, T, 1, N), (B, T, 1, N), (H,), (B, H, P, N))
    leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
    A_log, dt_logits, x, b, c, skip, state = leaves
    dt = F.softplus(dt_logits - 2)
    y, end = operation(x, -A_log.exp() * dt, b, c, state, dt=dt, skip=skip)
    loss = (y * torch.linspace(-1, 1, P)).sum() + (end * torch.linspace(0, 1, N)).sum()
    return y, end, *torch.autograd.grad(loss, leaves)


def main():
    ours = results(lambda *args, **options: ssd(*args, **options, backend="torch"))
    theirs = results(PEERS["mamba_ssm"].call)
    print(max(relative_error(got, wanted) for got, wanted in zip(theirs, ours, strict=True)))


if __name__ == "__main__":
    main()
