import json
import math
import os
import pickle
import resource
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from harness import checkpoint

ABOUT = {"written_by": "me", "seconds": 0.1 + 0.2, "watched": [[3, 1e-300, 2 / 3]], "said": "é\n"}


def tensors():
    return {
        "weight.a": torch.tensor([[1.5, -0.0], [math.pi, 1e-45]]),
        "step.a": torch.tensor(7.0),
        "losses": torch.tensor([0.1, 1 / 3], dtype=torch.float64),
        "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "none": torch.empty(0, dtype=torch.float64),
    }


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoints" / "run.safetensors"
    checkpoint.write(path, tensors(), ABOUT)
    return path


def names(path):
    return sorted(file.name for file in path.parent.iterdir())


def bits(tensor):
    return tensor.dtype, tensor.shape, bytes(tensor.contiguous().view(-1).view(torch.uint8))


def test_what_is_written_is_read_to_the_last_bit(path):
    found, about = checkpoint.read(path, "me")
    assert about == ABOUT
    assert {name: bits(t) for name, t in found.items()} == {
        name: bits(t) for name, t in tensors().items()
    }
    assert names(path) == [path.name]


def test_another_s_is_none(path):
    assert checkpoint.read(path, "me too") is None
    assert checkpoint.read(path.with_name("absent"), "me") is None


@pytest.mark.parametrize(("owner", "name"), [(Path, "replace"), (os, "fsync")])
def test_a_write_that_fails_leaves_the_old_and_nothing_else(path, monkeypatch, owner, name):
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="No space left") as error:
        checkpoint.write(path, {"weight.a": torch.zeros(1000)}, ABOUT)
    assert error.value.filename == str(path)
    assert names(path) == [path.name]
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_old_and_nothing_else(path):
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            checkpoint.write(path, {"weight.a": torch.zeros(1000)}, ABOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(path)
    assert names(path) == [path.name]
    assert path.read_bytes() == before


def test_a_write_that_is_interrupted_leaves_the_old_and_nothing_else(path, monkeypatch):
    before = path.read_bytes()

    def interrupt(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(path, {"weight.a": torch.zeros(1000)}, ABOUT)
    assert names(path) == [path.name]
    assert path.read_bytes() == before


def test_it_is_on_the_disk_before_it_gets_its_name(path, monkeypatch):
    events = []
    sync, replace = os.fsync, type(path).replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("sync"), sync(file)))
    monkeypatch.setattr(
        type(path), "replace", lambda *ends: (events.append("name"), replace(*ends))
    )
    checkpoint.write(path, tensors(), ABOUT)
    assert events == ["sync", "name"]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nothing_that_is_no_number_is_said_of_it(path, number):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write(path, tensors(), {**ABOUT, "seconds": number})
    assert path.read_bytes() == before
    assert names(path) == [path.name]


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 50, -1])
def test_a_truncated_one_is_none(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    assert checkpoint.read(path, "me") is None


def with_header(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"not a checkpoint at all" * 10,
        b"\xff" * 100,
        with_header({}),
        with_header({"__metadata__": {}}),
        with_header({"__metadata__": {"about": "{"}}),
        with_header({"__metadata__": {"about": "[]"}}),
        with_header({"__metadata__": {"about": "null"}}),
        with_header({"__metadata__": {"about": "{}"}}),
        with_header({"__metadata__": {"about": '{"written_by": 3}'}}),
        with_header({"__metadata__": {"about": "[" * 100_000}}),
        with_header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        with_header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
        with_header(b"\xff\xfe"),
    ],
    ids=range(13),
)
def test_what_is_no_checkpoint_is_none(path, content):
    path.write_bytes(content)
    assert checkpoint.read(path, "me") is None


class Malicious:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [torch.save, lambda what, path: path.write_bytes(what)])
def test_a_pickle_is_not_executed(path, write, tmp_path):
    trace = tmp_path / "executed"
    attack = Malicious(trace)
    write(attack if write is torch.save else pickle.dumps(attack), path)
    assert checkpoint.read(path, "me") is None
    assert not trace.exists()
    other = path.replace(tmp_path / "run.pt")
    torch.load(other, weights_only=False) if write is torch.save else pickle.loads(
        other.read_bytes()
    )
    assert trace.exists()  # elsewhere it would have been


# Weights and moments


def trained(seed, steps=3):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        module(torch.ones(2, 4)).square().sum().backward()
        optimiser.step()
    return module, optimiser


def test_weights_and_moments_are_put_back_where_they_were(tmp_path):
    module, optimiser = trained(0)
    taken = checkpoint.tensors_of(module, optimiser)
    kinds = ("weight", "step", "exp_avg", "exp_avg_sq")
    assert set(taken) == {f"{kind}.{n}" for kind in kinds for n, _ in module.named_parameters()}
    checkpoint.write(tmp_path / "run", taken, {"written_by": "me"})
    read, _ = checkpoint.read(tmp_path / "run", "me")

    other, others_optimiser = trained(1, steps=0)
    checkpoint.restore(other, others_optimiser, read)
    for one in (module, other):
        opt = optimiser if one is module else others_optimiser
        opt.zero_grad()
        one(torch.ones(2, 4)).square().sum().backward()
        opt.step()
    after, others = (
        checkpoint.tensors_of(*pair) for pair in ((module, optimiser), (other, others_optimiser))
    )
    assert after.keys() == others.keys()
    assert all(torch.equal(after[name], others[name]) for name in after)
    assert after["step.0.weight"] == 4
    # What was put back is a copy: a further step does not change what was read.
    again, _ = checkpoint.read(tmp_path / "run", "me")
    assert all(torch.equal(read[name], again[name]) for name in again)
