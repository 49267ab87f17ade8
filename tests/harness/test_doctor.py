"""What `seqscale doctor` says of Triton's interpreter."""

import pytest
import torch

from harness import doctor
from harness.doctor import Check

on_a_gpu = torch.cuda.is_available()


@pytest.fixture
def kernels_run(monkeypatch):
    monkeypatch.setattr(
        doctor, "_kernel_runs", lambda name, device, variables, good: Check(name, True, good)
    )


def test_an_interpreter_that_is_on_is_said(kernels_run, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET is set" in doctor._interpreter().found
    monkeypatch.delenv("TRITON_INTERPRET")
    assert doctor._interpreter().found == "runs kernels on the CPU, slowly"


def test_an_interpreter_that_is_on_hides_a_gpu(kernels_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = doctor._triton()
    assert not found.works
    assert found.remedy == "unset TRITON_INTERPRET"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert doctor._triton().works


@pytest.mark.skipif(on_a_gpu, reason="where there is a GPU, kernels are compiled")
def test_backends_are_those_that_run_here(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doctor._backends().found == "of ssd: reference; torch; triton (interpreted)"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "not triton (ssd: backend 'triton' needs an NVIDIA GPU" in doctor._backends().found
