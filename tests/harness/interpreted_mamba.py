"""mamba-ssm's own kernels in Triton's interpreter, called as a block calls our operation.

Prints the largest relative error of outputs, state and gradients against ours. A process of its
own: the interpreter cannot be turned off again.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import torch
import torch.nn.functional as F

from archs.ops.ssd import ssd
from harness import pretend
from harness.correctness import relative_error
from harness.peers import PEERS


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
    with pretend.gpu(90):
        theirs = results(PEERS["mamba_ssm"].call)
    print(max(relative_error(got, wanted) for got, wanted in zip(theirs, ours, strict=True)))


if __name__ == "__main__":
    main()
