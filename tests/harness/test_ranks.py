import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import archs
from harness import checkpoint, ranks, record, run, trials, worker
from harness.ranks import Ranks
from harness.trials import LossGrid, trial_cells

CEILINGS = {"copy_bytes_per_s": 1e15, "matmul_flops_per_s_float32": 1e15, "exp2_per_s": 1e15}
STEPS = 50
HYBRID = "rwkv7+hyena"  # what one block hands on to others, and a block with parts in a list


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The name of a corpus of words that repeat."""
    folder = tmp_path_factory.mktemp("text")
    draws = random.Random(0)
    words = ["".join(draws.choices("abcde", k=draws.randint(2, 5))) for _ in range(40)]
    for number in range(40):
        (folder / f"{number}.txt").write_text(" ".join(draws.choices(words, k=300)))
    return f"files:{folder}/*.txt"


def case_of(corpus, arch="mamba2", parallel=None, **fields):
    grid = LossGrid(
        archs=arch,
        lengths=16,
        size="d64" if "+" in arch else "d32h16",
        batch=4,
        tokens=STEPS * 4 * 16,
        corpus=corpus,
        evaluate_at=32,
        validation_tokens=256,
        validation_block=32,
        learning_rates=1e-3,  # at 1e-2 a change of the last bit grows past 1e-4 in ten steps
    )
    if parallel is not None:
        grid = replace(grid, ranks=2, parallel=parallel)
    (case,) = trial_cells([replace(grid, **fields)])
    return case


def kept_at(path, every_s=3600.0):
    return {"path": str(path), "every_s": every_s, "written_by": "me"}


def alone(case, path):
    """The run of a case in this process, and its weights from its last checkpoint."""
    reply = worker.measured(case, kept_at(path, 0), Ranks("cpu"), {}, lambda share: None)
    assert reply["status"] == "ok", reply["detail"]
    return reply


def losses(reply):
    return torch.tensor(reply["samples"]["train_loss_bits_per_byte"], dtype=torch.float64)


def close(reply, single):
    """Whether every loss of two runs of a case agrees within 1e-4."""
    names = ("train_loss", "watched_loss", "evaluated_loss", "position_loss")
    for name in names:
        found, wanted = (r["samples"][f"{name}_bits_per_byte"] for r in (reply, single))
        assert found == pytest.approx(wanted, abs=1e-4), name
    value = "val_loss_bits_per_byte"
    assert reply["metrics"][value] == pytest.approx(single["metrics"][value], abs=1e-4)
    for exact in ("train_flops", "params", "state_bytes", "tokens"):
        assert reply["metrics"][exact] == single["metrics"][exact]


# Two processes of a group, which do one run after another

PAIR = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from archs.model import ModelOutput
from harness import checkpoint, training, worker
from harness.ranks import Ranks
from harness.record import Case

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)


class Interrupted(BaseException):
    pass


def run(case, kept, parallel, until):
    def progress(share):
        if share >= until:
            raise Interrupted

    try:
        return worker.measured(
            Case(**case), kept, Ranks("cpu", rank, 2, parallel), {}, progress
        )
    except Interrupted:
        return None


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix, self.spared = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
        self.vector = nn.Parameter(torch.ones(2))
        self.spared._no_weight_decay = True

    def forward(self, inputs):
        nothing = 0 * sum(p.sum() for p in self.parameters())
        return ModelOutput(nothing.expand(*inputs.shape, 2))


def decayed(parallel):
    model, zeros = Weights(), torch.zeros(2, 3, dtype=torch.int64)
    recipe = training.Recipe(steps=3, learning_rate=0.5)
    training.train(
        model, lambda step: (zeros, zeros), recipe, ranks=Ranks("cpu", rank, 2, parallel)
    )
    whole = {name: checkpoint._whole(p) for name, p in model.named_parameters()}
    return sorted(name for name, p in whole.items() if not torch.equal(p, torch.ones_like(p)))


jobs = json.loads((folder / "jobs.json").read_text())
replies = {name: run(*job) for name, job in jobs.items()}
replies["decayed"] = {parallel: decayed(parallel) for parallel in ("ddp", "fsdp")}
(folder / f"{rank}.json").write_text(json.dumps(replies))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def pair(corpus, tmp_path_factory):
    """Replies of both processes by run, and the folder with the checkpoints."""
    folder = tmp_path_factory.mktemp("pair")
    jobs = {}
    for name, arch, parallel, every_s, until in (
        ("ddp", "mamba2", "ddp", 3600, 2),
        ("ddp-interrupted", "mamba2", "ddp", 0, 0.34),
        ("ddp-interrupted again", "mamba2", "ddp", 0, 2),
        ("fsdp", HYBRID, "fsdp", 3600, 2),
        ("fsdp-interrupted", HYBRID, "fsdp", 0, 0.34),
        ("fsdp-interrupted again", HYBRID, "fsdp", 0, 2),
    ):
        kept = kept_at(folder / f"{name.split()[0]}.safetensors", every_s)
        jobs[name] = case_of(corpus, arch, parallel).asked(), kept, parallel, until
    (folder / "jobs.json").write_text(json.dumps(jobs))
    both = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", PAIR, str(rank), str(folder)],
            env={**run.child_environment(), "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], folder


@pytest.fixture(scope="module")
def single(corpus, tmp_path_factory):
    """Replies of runs in this process by architecture, and the folder with their checkpoints."""
    folder = tmp_path_factory.mktemp("single")
    return {
        arch: alone(case_of(corpus, arch), folder / f"{arch}.safetensors")
        for arch in ("mamba2", HYBRID)
    }, folder


@pytest.mark.parametrize(("name", "arch"), [("ddp", "mamba2"), ("fsdp", HYBRID)])
def test_two_ranks_learn_what_one_process_does(pair, single, name, arch):
    (first, second), _ = pair
    for replies in (first, second):
        assert replies[name]["status"] == "ok", replies[name]["detail"]
        close(replies[name], single[0][arch])
    assert len(losses(first[name])) == STEPS
    assert torch.equal(losses(first[name]), losses(second[name]))
    assert losses(first[name])[-1] < 0.8 * losses(first[name])[0]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_ranks_go_on_from_their_checkpoint_to_the_last_bit(pair, name):
    (first, _), _ = pair
    assert first[f"{name}-interrupted"] is None
    again, whole = first[f"{name}-interrupted again"], first[name]
    assert again["status"] == "ok", again["detail"]
    assert again["samples"]["resumed_at_step"] == [17]
    assert torch.equal(losses(again), losses(whole))
    for samples in ("watched_loss", "evaluated_loss", "position_loss"):
        told = (r["samples"][f"{samples}_bits_per_byte"] for r in (again, whole))
        assert next(told) == next(told)


def test_weights_that_are_cut_up_are_kept_whole(pair, single):
    found, wanted = (
        checkpoint.read(folder / name, "me")[0]
        for folder, name in (
            (pair[1], "fsdp-interrupted.safetensors"),
            (single[1], f"{HYBRID}.safetensors"),
        )
    )
    assert found.keys() == wanted.keys()
    shapes = {name: tensor.shape for name, tensor in found.items()}
    assert shapes == {name: tensor.shape for name, tensor in wanted.items()}
    model = archs.build_model(HYBRID, width=64, depth=2, max_len=32, backend="torch")
    names = [name for name, _ in model.named_parameters()]
    kinds = ("weight", "step", "exp_avg", "exp_avg_sq")
    assert set(found) == {"losses", *(f"{kind}.{name}" for kind in kinds for name in names)}
    moved = [n for n in found if (found[n] - wanted[n]).abs().max() > 1e-2]
    assert moved == []


def test_decay_spares_the_same_weights_in_every_rank(pair):
    (first, second), _ = pair
    assert first["decayed"] == second["decayed"] == {"ddp": ["matrix"], "fsdp": ["matrix"]}


# Batches


def test_ranks_share_a_batch_without_a_rest():
    batch = torch.arange(12).view(6, 2), torch.arange(12, 24).view(6, 2)
    shares = [Ranks("cpu", rank, 3).share(batch) for rank in range(3)]
    for whole, parts in zip(batch, zip(*shares, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), whole)
        assert [len(part) for part in parts] == [2, 2, 2]


def test_one_process_is_alone():
    one, model = Ranks("cuda:3"), torch.nn.Linear(2, 2)
    assert one.device_type == "cuda"
    assert one.wrap(model) is model
    assert one.total(torch.tensor(2.5)) == 2.5
    assert [one.agree(wish) for wish in (True, False)] == [True, False]


# Started as torchrun does, in the worker of their cell

FAULTY = '''
import os, signal, time
from pathlib import Path
import torch
from archs.mamba2 import Mamba2Block

class Faulty(Mamba2Block):
    """Is well but in rank 1, where a variable says what happens after so many steps."""

    steps = 0

    def forward(self, x, state=None, carry=None):
        self.steps += torch.is_grad_enabled()
        fault, _, after = os.environ.get("SEQSCALE_TEST_FAULT", "").partition(" ")
        if fault and os.environ.get("RANK") == "1" and self.steps > int(after):
            Path(os.environ["SEQSCALE_TEST_MARK"]).write_text(str(os.getpid()))
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "raises":
                raise ZeroDivisionError("a bug in one rank")
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
            while True:
                time.sleep(1)
        return super().forward(x, state, carry)
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder for all that a run leaves, named in the command lines of its ranks."""
    root = tmp_path / "site"
    info = root / "faulty_ranks-1.0.dist-info"
    info.mkdir(parents=True)
    (root / "faulty_ranks.py").write_text(FAULTY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-ranks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[seqscale.blocks]\nfaulty = faulty_ranks:Faulty\n")
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("SEQSCALE_TEST_MARK", str(tmp_path / "mark"))
    monkeypatch.setattr(run.Launcher, "measure_ceilings", lambda self, dtypes: CEILINGS)
    archs.architectures.cache_clear()
    yield tmp_path
    archs.architectures.cache_clear()
    sys.modules.pop("faulty_ranks", None)


def alive(place):
    """Processes with the folder in their command line: ranks and who started them."""
    found = subprocess.run(
        ["pgrep", "-f", f"harness.ranks {place}"], capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]


def gone(place):
    """Whether nothing is alive, or soon will not be."""
    deadline = time.monotonic() + 10
    while alive(place) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive(place) == []


def swept(case, place):
    """The last record of a case."""
    trials.run([case], place / "run", device="cpu", checkpoint_every_s=0)
    return max(record.load(place / "run")[0], key=lambda found: found.environment["utc"])


def test_a_rank_that_hangs_ends_at_the_time_limit_and_the_cell_goes_on(
    corpus, place, pair, monkeypatch
):
    case = case_of(corpus, "faulty", "ddp")
    mark, ready = place / "mark", run.select.select

    def until_it_hangs(readers, writers, errors, seconds):
        """The time is over when a rank hangs."""
        while not (found := ready(readers, writers, errors, 0.1))[0] and not mark.exists():
            pass
        return found

    with monkeypatch.context() as patch:
        patch.setenv("SEQSCALE_TEST_FAULT", "hangs 17")
        patch.setattr(run.select, "select", until_it_hangs)
        found = swept(case, place)
    assert found.status == "timeout"
    assert mark.exists()
    assert gone(place)
    assert len(list((place / "run").rglob("*.safetensors"))) == 1

    monkeypatch.setattr(run, "stands", lambda *_: False)  # as under a longer limit
    found = swept(case, place)
    assert found.status == "ok", found.detail
    assert found.samples["resumed_at_step"] == [17]
    (first, _), _ = pair
    whole = first["ddp"]["samples"]
    for name in ("train_loss_bits_per_byte", "watched_loss_bits_per_byte"):
        assert found.samples[name] == whole[name]
    assert not list((place / "run").rglob("*.safetensors*"))


def requested(corpus, place):
    case = case_of(corpus, "faulty", "ddp")
    return {"case": case.asked(), "kept": kept_at(place / "kept"), "device": "cpu"}


def test_a_rank_that_dies_takes_the_others_with_it(corpus, place, monkeypatch):
    monkeypatch.setenv("SEQSCALE_TEST_FAULT", "killed 3")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with pytest.raises(ranks.RankDiedError) as error:
        ranks.launch(requested(corpus, place), 2)
    mark = place / "mark"
    assert time.time() - mark.stat().st_mtime < 20
    assert str(error.value) == f"exitcode : -9 (pid: {mark.read_text()}) (SIGKILL)"
    assert "\n" not in str(error.value)
    assert alive(place) == []


def test_ranks_die_with_who_launched_them(corpus, place, monkeypatch):
    monkeypatch.setenv("SEQSCALE_TEST_FAULT", "hangs 3")
    code = "import json, sys; from harness import ranks; ranks.launch(json.loads(sys.argv[1]), 2)"
    command = [sys.executable, "-P", "-c", code, json.dumps(requested(corpus, place))]
    launching = subprocess.Popen(command, env=run.child_environment())
    try:
        deadline = time.monotonic() + 120
        while not (place / "mark").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(alive(place)) == 3  # torchrun and two ranks
    finally:
        launching.kill()
        launching.wait()
    assert gone(place)


def test_a_rank_that_died_is_a_crash_and_its_checkpoint_stays(corpus, tmp_path, monkeypatch):
    def launch(request, count):
        assert count == 2
        raise ranks.RankDiedError("exitcode : -9 (pid: 7)")

    monkeypatch.setattr(ranks, "launch", launch)
    path = tmp_path / "kept"
    path.touch()
    settings = {"device": "cpu", "place": "here", "answer": None}
    reply = worker._trained(settings, case_of(corpus, parallel="ddp"), kept_at(path), {})
    assert reply["status"] == "crashed"
    assert reply["reason"] == "RankDiedError: exitcode : -9 (pid: 7)"
    assert path.exists()


REPORT = """
Traceback (most recent call last):
  File "harness/worker.py", line 1, in attempt
    raise ZeroDivisionError("a bug")
ZeroDivisionError: a bug
RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer
E1128 09:46:49.297000 6982 api.py:1002] failed (exitcode: 1) local_rank: 0 (pid: 7036) of binary
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
harness.ranks FAILED
Failures:
[1]:
  exitcode  : -15 (pid: 7037) (SIGTERM)
Root Cause (first observed failure):
[0]:
  exitcode  : 1 (pid: 7036)
  error_file: <N/A>
============================================================
"""


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        (REPORT, "exitcode : 1 (pid: 7036); ZeroDivisionError: a bug"),
        (
            REPORT.replace("-15 (pid: 7037) (SIGTERM)", "-9 (pid: 7037) (SIGKILL)"),
            "exitcode : -9 (pid: 7037) (SIGKILL)",
        ),
        ("torch.OutOfMemoryError: out of memory\nend", "torch.OutOfMemoryError: out of memory"),
        ("one\n  two \n\n", "two"),
        ("", "it said nothing"),
    ],
)
def test_what_is_told_of_the_rank_that_failed_first(printed, told):
    assert ranks._why(printed) == told
