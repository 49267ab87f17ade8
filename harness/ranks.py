"""The processes that share a training run: torchrun's, or this one alone.

A run of several ranks is started by `launch`, inside the worker of its cell, as torchrun does:
`python -m harness.ranks REQUEST REPLY` in each. One that dies takes the others with it, and all
die with the worker.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ERROR = re.compile(r"[\w.]+(Error|Exception)\b")  # how the last line of a traceback begins

# The ranks die with torchrun, and torchrun with who launched it, whose process ID comes first.
TORCHRUN = """
import sys
from harness.worker import die_with
die_with(int(sys.argv.pop(1)))
from torch.distributed.run import main
main()
"""


class RankDiedError(RuntimeError):
    """A process of a shared run died, and the run with it."""


@dataclass(frozen=True)
class Ranks:
    """This process's place.

    Attributes:
        device: "cpu", "cuda", or of several "cuda:1".
        rank: from 0.
        count: of processes.
        parallel: "ddp" or "fsdp", where there are several.
    """

    device: str
    rank: int = 0
    count: int = 1
    parallel: str = "ddp"

    @property
    def device_type(self) -> str:
        """The kind "cpu" or "cuda" of device."""
        return self.device.partition(":")[0]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call: gradients of all ranks are averaged in its backward pass.

        With "fsdp" it is the model itself, its blocks' weights cut up (FSDP2).
        """
        if self.count == 1:
            return model
        if self.parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard

            from archs.block import Block

            for block in [module for module in model.modules() if isinstance(module, Block)]:
                fully_shard(block)
            # Of a forward pass without a backward no whole weights may stay: they are not those
            # that the optimiser and a checkpoint know.
            fully_shard(model, reshard_after_forward=True)
            return model
        on_gpu = self.device_type == "cuda"
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[torch.device(self.device)] if on_gpu else None
        )

    def share(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """This rank's sequences of a batch whose size all ranks divide."""
        inputs, targets = (part.chunk(self.count)[self.rank] for part in batch)
        return inputs, targets

    def total(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def agree(self, wish: bool) -> bool:
        """What rank 0 wishes: all do the same."""
        if self.count == 1:
            return wish
        said = torch.tensor(int(wish), device=self.device)
        dist.broadcast(said, 0)
        return bool(said)


def launch(request: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Measure a case in `count` processes; the reply of rank 0.

    Args:
        request: case, kept, and device "cpu" or "cuda": as `harness.worker.measured` takes them.
        count: of ranks.

    Raises:
        RankDiedError: one died; the message is its exit code, and the first error told.
    """
    with tempfile.TemporaryDirectory(prefix="seqscale-") as folder:
        asked, replied = Path(folder) / "request.json", Path(folder) / "reply.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [
            "-P",
            "-c",
            TORCHRUN,
            str(os.getpid()),
            "--nnodes=1",
            f"--nproc-per-node={count}",
        ]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "harness.ranks"]
        done = subprocess.run(
            [sys.executable, *command, str(asked), str(replied)],
            capture_output=True,
            text=True,
            errors="replace",
            env={"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count)), **os.environ},
        )
        if done.returncode or not replied.exists():
            raise RankDiedError(_why(done.stderr))
        return json.loads(replied.read_text(encoding="utf-8"))


def _why(printed: str) -> str:
    """What torchrun and the ranks say of the end: of one that was killed, or the first error.

    Where one is killed the others fail for want of it, and may be seen first. What torchrun itself
    ends it sends SIGTERM.
    """
    lines = [" ".join(line.split()) for line in printed.splitlines() if line.strip()]
    ends = [line for line in lines if line.startswith("exitcode : ")]
    killed = [line for line in ends if "(SIG" in line and "(SIGTERM)" not in line]
    errors = [line for line in lines if ERROR.match(line) and "ChildFailedError" not in line]
    said = killed[:1] or ends[-1:] + errors[:1] or lines[-1:] or ["it said nothing"]
    return "; ".join(said)


def main() -> None:
    """Take a rank's part in measuring a case."""
    from harness.record import Case
    from harness.worker import die_with, measured

    die_with(os.getppid())
    asked, replied = map(Path, sys.argv[1:])
    request = json.loads(asked.read_text(encoding="utf-8"))
    case = Case(**request["case"])
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = request["device"]
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    ranks = Ranks(device, rank, count, case.options["parallel"])
    reply = measured(case, request["kept"], ranks, {}, lambda share: None)
    if reply["status"] not in ("ok", "diverged", "unsupported"):  # and not in all ranks, perhaps
        print(reply["detail"], file=sys.stderr, flush=True)
        os._exit(1)  # the others wait for this one: torchrun ends them
    dist.destroy_process_group()
    if rank == 0:
        replied.write_text(json.dumps(reply, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main()
