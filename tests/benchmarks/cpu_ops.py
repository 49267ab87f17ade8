"""Our PyTorch operations beside others' on the CPU: forward and backward, interleaved, one run.

    python tests/benchmarks/cpu_ops.py [--rounds 40] [--op ssd ...]

Every round runs each implementation once in random order; the ratio theirs/ours is paired by
round, with a 95 % interval (`timing.speedup`). "ours again" is ours a second time: its ratio is
the noise of the machine. Exit code 1 if a lower bound falls short of its target.
"""

import argparse
import os
import sys
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.ops.attention import attention
from archs.ops.long_conv import long_conv
from archs.ops.ssd import ssd
from archs.ops.wkv7 import wkv7
from harness import memory, timing
from harness.peers import ssd_minimal_discrete

T = 4096


def training_pass(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Callable[[], None]:
    """Forward and backward with a fixed random cotangent; gradients cleared each time."""
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    with torch.no_grad():
        shape = function(**leaves).shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def call() -> None:
        function(**leaves).backward(cotangent)
        for leaf in leaves.values():
            leaf.grad = None

    return call


def ssd_pair() -> tuple[Callable, dict[str, Callable]]:
    """SSD at B 1, H 8, P 64, N 64, G 1 against Mamba's minimal listing at chunk 32, 64, 128."""
    H, P, N = 8, 64, 64
    dt = F.softplus(torch.randn(1, T, H) - 4)
    inputs = {
        "x": torch.randn(1, T, H, P),
        "log_decay": -dt * torch.linspace(1, 16, H),
        "b": torch.randn(1, T, 1, N),
        "c": torch.randn(1, T, 1, N),
    }
    minimal = ssd_minimal_discrete()

    def theirs(chunk: int) -> Callable[..., Tensor]:
        def call(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
            b, c = b.expand(-1, -1, H, -1), c.expand(-1, -1, H, -1)
            return minimal(x, log_decay, b, c, chunk)[0]

        return call

    ours = training_pass(lambda **kw: ssd(**kw, backend="torch")[0], inputs)
    return ours, {
        f"ssd_minimal_discrete, chunk {c}": training_pass(theirs(c), inputs) for c in (32, 64, 128)
    }


def wkv7_pair() -> tuple[Callable, dict[str, Callable]]:
    """WKV-7 at B 1, H 8, K 64 against a loop over unbound inputs."""
    shape = (1, T, 8, 64)
    removal = F.normalize(torch.randn(shape), dim=-1)
    inputs = {
        "r": torch.randn(shape),
        "log_decay": -0.6065 * torch.rand(shape),
        "k": torch.randn(shape),
        "v": torch.randn(shape),
        "a": -removal,
        "b": removal * torch.rand(shape),
    }

    def fold(r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        state = r.new_zeros(1, 8, 64, 64)  # (B, H, V, K)
        outputs = []
        parts = (t.unbind(1) for t in (r, log_decay.exp(), k, v, a, b))
        for r_t, w_t, k_t, v_t, a_t, b_t in zip(*parts, strict=True):
            removed = state @ a_t.unsqueeze(-1)  # (B, H, V, 1)
            state = (
                state * w_t.unsqueeze(-2)
                + removed * b_t.unsqueeze(-2)
                + v_t.unsqueeze(-1) * k_t.unsqueeze(-2)
            )
            outputs.append((state @ r_t.unsqueeze(-1)).squeeze(-1))
        return torch.stack(outputs, dim=1)

    ours = training_pass(lambda **kw: wkv7(**kw, backend="torch")[0], inputs)
    return ours, {"fold over unbound inputs": training_pass(fold, inputs)}


def long_conv_pair() -> tuple[Callable, dict[str, Callable]]:
    """The gated long convolution at B 1, D 512 against plain rfft and irfft of length 2 T."""
    D = 512
    inputs = {
        "u": torch.randn(1, D, T),
        "filter": torch.randn(D, T) * torch.exp(-8 * torch.arange(T) / T),
        "pre_gate": torch.randn(1, D, T),
        "post_gate": torch.randn(1, D, T),
        "skip": torch.randn(D),
    }

    def plain(
        u: Tensor, filter: Tensor, pre_gate: Tensor, post_gate: Tensor, skip: Tensor
    ) -> Tensor:
        z = u * pre_gate
        spectrum = torch.fft.rfft(z, n=2 * T) * torch.fft.rfft(filter, n=2 * T)
        y = torch.fft.irfft(spectrum, n=2 * T)[..., :T]
        return post_gate * (y + skip[:, None] * z)

    ours = training_pass(lambda **kw: long_conv(**kw, backend="torch"), inputs)
    return ours, {"rfft, irfft": training_pass(plain, inputs)}


def attention_pair() -> tuple[Callable, dict[str, Callable]]:
    """Causal attention at B 1, H 8, K 64 against scaled_dot_product_attention."""
    inputs = {name: torch.randn(1, T, 8, 64) for name in "qkv"}

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    ours = training_pass(lambda **kw: attention(**kw, backend="torch"), inputs)
    return ours, {"SDPA": training_pass(sdpa, inputs)}


# Operation: (how to build the pair, the lower bound its ratio must reach).
PAIRS = {
    "ssd": (ssd_pair, 1.5),
    "wkv7": (wkv7_pair, 4.0),
    "long_conv": (long_conv_pair, 0.97),
    "attention": (attention_pair, 0.97),
}


def main() -> int:
    """Run the pairs and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--op", choices=PAIRS, action="append")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(timing.prepare_process(arguments.threads), f"torch {torch.__version__}, float32, T {T}")
    short = False
    for name in arguments.op or PAIRS:
        build, target = PAIRS[name]
        torch.manual_seed(0)
        ours, theirs = build()
        peaks = {n: memory.peak(f).bytes for n, f in {"ours": ours, **theirs}.items()}
        samples = timing.measure_interleaved(
            {"ours": ours, "ours again": ours, **theirs}, rounds=arguments.rounds
        )
        best = min(theirs, key=lambda n: sorted(samples[n])[len(samples[n]) // 2])
        for other, times in samples.items():
            middle = sorted(times)[len(times) // 2]
            line = f"{name:10s} {other:34s} {middle:8.1f} ms"
            if (peak := peaks.get(other)) is not None:
                line += f", peak {peak / 2**20:.0f} MiB"
            if other != "ours":
                ratio = timing.speedup(samples["ours"], times)
                line += f"   x{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            print(line, flush=True)
        low = timing.speedup(samples["ours"], samples[best]).low
        verdict = "reached" if low >= target else "MISSED"
        print(f"{name:10s} lower bound {low:.3f} against {best}, target {target}: {verdict}\n")
        short |= low < target
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
