import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import traffic
from harness.run import child_environment

KERNELS = Path(__file__).parent / "traffic_kernels.py"
N = 1000  # floats in each vector there


@pytest.fixture(scope="module")
def document():
    """What was counted of the calls in traffic_kernels.py, in an interpreting process."""
    done = subprocess.run(
        [sys.executable, "-P", KERNELS],
        env={**child_environment(), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def counted(document):
    return document["counted"]


def kernel(counts, name):
    return next(k for k in counts["kernels"] if k["name"] == name)


def test_a_copy_moves_its_vector_once_in_and_once_out(counted):
    copy = kernel(counted["copy"], "copy")
    once = {"requested_bytes": 4 * N, "unique_bytes": 4 * N, "sector_bytes": 4 * N}
    assert copy["arguments"] == {
        "x": {**once, "read_bytes": 4 * N, "written_bytes": 0},
        "y": {**once, "read_bytes": 0, "written_bytes": 4 * N},
    }
    assert (copy["launches"], copy["programs"], copy["loads"], copy["stores"]) == (1, 4, 4, 4)
    assert copy["atomics"] == copy["descriptor_accesses"] == copy["exponentials"] == 0
    assert copy["dot_flops"] == {}


def test_an_extra_pass_is_an_extra_launch_and_twice_the_bytes(counted):
    assert counted["copy"]["launches"] == 1
    assert counted["copy"]["kernel_bytes"] == 8 * N
    assert counted["copy twice"]["launches"] == 2
    assert counted["copy twice"]["kernel_bytes"] == 16 * N


def test_a_second_read_shows_in_requested_bytes_alone(counted):
    x = kernel(counted["reading twice"], "copy_reading_twice")["arguments"]["x"]
    assert (x["requested_bytes"], x["unique_bytes"]) == (8 * N, 4 * N)


def test_overlapping_reads(counted):
    x = kernel(counted["neighbours"], "neighbours")["arguments"]["x"]
    assert (x["requested_bytes"], x["unique_bytes"]) == (4 * N + 4 * (N - 1), 4 * N)
    # Straight: 125 sectors of 8. Shifted by one, a block of 256 touches 32 sectors and, but for the
    # first, one more before them; the last block has 232 lanes.
    assert x["sector_bytes"] == 32 * (125 + 32 + 33 + 33 + 30)


def test_lanes_that_do_not_lie_side_by_side_touch_a_sector_each(counted):
    x = kernel(counted["every eighth"], "every_eighth")["arguments"]["x"]
    assert (x["requested_bytes"], x["unique_bytes"], x["sector_bytes"]) == (4 * N, 4 * N, 32 * N)


def test_memory_read_and_written_in_one_launch_counts_once(counted):
    x = kernel(counted["in place"], "add_in_place")["arguments"]["x"]
    assert (x["unique_bytes"], x["read_bytes"], x["written_bytes"]) == (4 * N, 4 * N, 4 * N)
    assert x["requested_bytes"] == 8 * N


def test_atomics(counted):
    histogram = kernel(counted["atomics"], "histogram")
    assert histogram["atomics"] == 4
    bins = histogram["arguments"]["bins"]
    assert (bins["requested_bytes"], bins["unique_bytes"]) == (4 * N, 32)
    assert (bins["read_bytes"], bins["written_bytes"], bins["sector_bytes"]) == (32, 32, 4 * 32)
    swap = kernel(counted["atomics"], "swap_once")
    assert (swap["atomics"], swap["unique_bytes"], swap["requested_bytes"]) == (3, 4, 12)


def test_descriptors_made_on_either_side(counted):
    on_device = kernel(counted["descriptors"], "transpose")
    assert on_device["programs"] == 2 * 3
    assert on_device["descriptor_accesses"] == 2 * 6
    for argument in on_device["arguments"].values():
        assert argument["unique_bytes"] == argument["requested_bytes"] == 4 * 32 * 48
        assert argument["sector_bytes"] == 4 * 32 * 48
    on_host = kernel(counted["descriptors"], "copy_tile")
    assert on_host["descriptor_accesses"] == 2
    assert {a: t["unique_bytes"] for a, t in on_host["arguments"].items()} == {"x": 512, "y": 512}


def test_dots_by_type_and_precision_and_exponentials(counted):
    product = kernel(counted["dots"], "product")
    flops = 2 * 16 * 32 * 16
    assert product["dot_flops"] == {"fp16": flops, "fp32 tf32": flops, "fp32 ieee": flops}
    assert product["exponentials"] == 3 * 16 * 16


def test_arguments_that_share_memory_are_one(counted):
    (both,) = kernel(counted["one memory"], "copy")["arguments"].items()
    name, argument = both
    assert name == "x+y"
    assert argument["read_bytes"] == argument["written_bytes"] == 4 * N
    assert argument["unique_bytes"] == 8 * N


def test_a_torch_copy_between_kernels_is_counted(counted):
    counts = counted["torch between"]
    clone = next(o for o in counts["operations"] if o["name"] == "clone")
    assert (clone["calls"], clone["unique_bytes"]) == (1, 8 * N)
    alone = counted["copy twice"]
    assert counts["unique_bytes"] == alone["unique_bytes"] + 8 * N
    assert counts["operation_calls"] == alone["operation_calls"] + 1
    assert counts["kernel_bytes"] == alone["kernel_bytes"]


def test_of_a_custom_operation_its_parts_are_counted(counted):
    assert counted["custom operation"] == counted["torch between"]


def test_masks_may_hold_integers(counted):
    found = kernel(counted["in steps"], "copy_in_steps")
    assert found["unique_bytes"] == found["requested_bytes"] == 8 * N


def test_torch_operations_views_are_free(counted):
    found = {
        o["name"]: (o["calls"], o["unique_bytes"], o["flops"])
        for o in counted["torch alone"]["operations"]
    }
    assert found == {
        "ones": (2, 800 + 80, 0),
        "add": (1, 800 + 80 + 800, 0),
        "add_": (1, 800 + 800, 0),
        "copy_": (1, 80 + 800, 0),
        "zero_": (1, 800, 0),
        "mm": (1, 800 + 400, 2 * 10 * 20 * 10),
    }


def test_bfloat16_is_refused_with_what_to_do(document):
    assert "UncountableError" in document["refused"]["bfloat16"]
    assert "use float16, which has the size of bfloat16" in document["refused"]["bfloat16"]
    assert "bfloat16 dots wrongly" in document["refused"]["bfloat16 inside"]
    assert "use float16" in document["refused"]["bfloat16 inside"]


def test_an_access_outside_the_arguments_is_an_error_that_names_the_kernel(document):
    assert (
        "reach_too_far accesses memory outside its arguments, beyond x"
        in (document["refused"]["outside"])
    )


def test_without_the_interpreter_nothing_is_counted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not os.environ.get("TRITON_INTERPRET")
    with pytest.raises(traffic.UncountableError, match="set TRITON_INTERPRET=1 before"):
        traffic.count(lambda: None)


def test_flops_of_real_transforms_and_of_attention_on_the_cpu():
    counts = traffic.Traffic()
    with traffic._TensorOperations(counts):
        torch.fft.irfft(torch.fft.rfft(torch.ones(3, 64)))
        q = torch.ones(1, 2, 16, 8, requires_grad=True)
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        torch.autograd.grad(y, q, torch.ones_like(y))
    flops = {name: o.flops for name, o in counts.operations.items()}
    assert flops["_fft_r2c"] == flops["_fft_c2r"] == 3 * 2.5 * 64 * 6
    forward = 2 * (2 * 2 * 16 * 16 * 8)
    assert flops["_scaled_dot_product_flash_attention_for_cpu"] == forward
    assert flops["_scaled_dot_product_flash_attention_for_cpu_backward"] == 2.5 * forward


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_accesses_against_sets_of_bytes(data):
    """Any pattern of masked accesses of any element size, at any alignment, in two tensors."""
    tensors = {
        name: torch.zeros(data.draw(st.integers(1, 400)), dtype=torch.uint8) for name in "xy"
    }
    launch = traffic._Launch(traffic.Kernel("k"), tensors.items())
    read, written, requested, sectors = set(), set(), 0, 0
    for _ in range(data.draw(st.integers(1, 4))):
        size = data.draw(st.sampled_from((1, 2, 4, 8)))
        kind = data.draw(st.sampled_from(((True, False), (False, True), (True, True))))
        choices = [(t.data_ptr(), t.numel()) for t in tensors.values() if t.numel() >= size]
        lanes = data.draw(
            st.lists(st.tuples(st.integers(0, 1), st.integers(0, 400), st.booleans()), max_size=64)
        )
        pointers, mask = [], []
        for which, place, on in lanes if choices else ():
            start, length = choices[which % len(choices)]
            pointers.append(start + place % (length - size + 1))
            mask.append(on)
        launch.access(
            np.array(pointers, np.uint64), np.array(mask, bool), size, read=kind[0], written=kind[1]
        )
        active = [p for p, on in zip(pointers, mask, strict=True) if on]
        touched = {p + i for p in active for i in range(size)}
        read |= touched if kind[0] else set()
        written |= touched if kind[1] else set()
        requested += size * len(active)
        sectors += _sectors(touched, tensors)
    launch.end()
    k = launch.kernel
    assert k.unique_bytes == len(read | written)
    assert sum(a.read_bytes for a in k.arguments.values()) == len(read)
    assert sum(a.written_bytes for a in k.arguments.values()) == len(written)
    assert k.requested_bytes == requested
    assert k.sector_bytes == 32 * sectors


def _sectors(touched, tensors):
    """Distinct sectors of each tensor, counted from its beginning."""
    found = set()
    for byte in touched:
        name, start = next(
            (n, t.data_ptr())
            for n, t in tensors.items()
            if t.data_ptr() <= byte < t.data_ptr() + t.numel()
        )
        found.add((name, (byte - start) // 32))
    return len(found)
