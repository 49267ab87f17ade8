"""Plans of our kernels in the records, and kernels in the interpreter that get no time."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from archs.ops import long_conv, short_conv, ssd
from harness import cost, record, sweep, timing, versus, worker
from harness.environment import code_hash
from harness.plans import recorded
from harness.ranks import Ranks
from harness.record import AGAIN, OURS, Case
from harness.run import Launcher, Settings
from harness.timing import Observation
from harness.worker import attempt

CEILINGS = {"copy_bytes_per_s": 1e15, "matmul_flops_per_s_float32": 1e15, "exp2_per_s": 1e15}
CELLS = [(level, phase) for level, phases in sweep.PHASES.items() for phase in phases]
SEEN = Observation({"time_ms_p50": 1.0}, {"time_ms": [1.0] * 8})
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="where there is a GPU, kernels are compiled"
)


def case(level="op", phase="forward", **changes):
    place = {"seq_len": None, "position": 33} if phase == "decode" else {"seq_len": 33}
    asked = {"kind": "cost", "batch": 1, "size": "d32", "backend": "triton", **place}
    return Case(level=level, phase=phase, **{"arch": "mamba2", **asked, **changes})


# What is recorded.


def test_every_plan_is_recorded_once_and_no_longer_than_asked(monkeypatch):
    monkeypatch.setattr(ssd, "plan", lambda shape, device: ssd.Plan(shape[1]))
    real, chosen = ssd.plan, {}
    with recorded(chosen):
        found = [ssd.plan((1, T, 1, 16), "cpu") for T in (3, 5, 3)]
    assert found == [(3,), (5,), (3,)]
    assert chosen == {"ssd": [{"segments": 3}, {"segments": 5}]}
    assert ssd.plan is real
    with pytest.raises(ZeroDivisionError), recorded(chosen):
        raise ZeroDivisionError
    assert ssd.plan is real


def test_plans_of_a_later_operation_are_recorded_by_themselves(monkeypatch):
    monkeypatch.setattr(short_conv, "plan", lambda shape, device: ssd.Plan(7), raising=False)
    chosen = {}
    with recorded(chosen):
        short_conv.plan((1, 2, 3), "cpu")
    assert chosen == {"short_conv": [{"segments": 7}]}


def test_a_plan_of_the_long_convolution_depends_on_the_type(monkeypatch):
    monkeypatch.setattr(long_conv, "_tf32_is_allowed", lambda: False)
    chosen = {}
    with recorded(chosen):
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            long_conv.plan((3, 64, 100), dtype, "cpu")
    splits = 2  # of 64 channels: 132 multiprocessors have a program
    assert chosen == {
        "long_conv": [
            {"splits": splits, "precision": "accurate"},
            {"splits": splits, "precision": "fast"},
        ]
    }


@interpreted
@pytest.mark.parametrize(("level", "phase"), [("op", "forward"), ("block", "prefill")])
def test_a_cell_of_hyena_records_its_plan(level, phase, monkeypatch):
    monkeypatch.setattr(cost, "refuse_interpreter", lambda case: None)
    monkeypatch.setattr(timing, "observe", lambda function, **options: SEEN)
    asked = case(level, phase, arch="hyena", batch=2, size="d16")
    plans = {}
    metrics, _ = cost.measure(asked, "cpu", CEILINGS, plans=plans)
    assert metrics["relative_error"] > 0
    assert plans == {"long_conv": [{"splits": 2, "precision": "accurate"}]}


@pytest.fixture
def two_segments(monkeypatch):
    """A plan that is seen to be ours, and nothing to stop the interpreter."""
    monkeypatch.setattr(ssd, "plan", lambda shape, device: ssd.Plan(2))
    monkeypatch.setattr(cost, "refuse_interpreter", lambda case: None)
    return ssd.plan


@interpreted
@pytest.mark.parametrize(("level", "phase"), CELLS)
def test_a_cell_records_its_plans_and_is_timed_without(level, phase, two_segments, monkeypatch):
    def observe(function, **options):
        assert ssd.plan is two_segments
        return SEEN

    monkeypatch.setattr(timing, "observe", observe)
    plans = {}
    metrics, _ = cost.measure(case(level, phase), "cpu", CEILINGS, plans=plans)
    assert metrics["relative_error"] > 0
    assert plans == ({} if phase == "decode" else {"ssd": [{"segments": 2}]})


@interpreted
def test_a_training_run_records_its_plans(two_segments, monkeypatch, tmp_path):
    def train(model, *arguments, **options):
        model(torch.zeros(1, 9).int())
        raise FloatingPointError("enough")

    monkeypatch.setattr("harness.training.train", train)
    monkeypatch.setattr(cost, "refuse_interpreter", lambda case: None)
    settings = {"task": "parity", "settings": {}, "steps": 1, "stop_at": 1, "learning_rate": 1e-3}
    asked = case("model", "train_step", kind="recall", options=settings)
    kept = {"path": str(tmp_path / "none"), "every_s": 60, "written_by": ""}
    plans = {}
    found = worker.measured(asked, kept, Ranks("cpu"), plans, lambda share: None)
    assert (found["status"], found["reason"]) == ("diverged", "FloatingPointError: enough")
    assert plans == {"ssd": [{"segments": 2}]}


@interpreted
def test_a_cell_that_goes_wrong_keeps_its_plans(two_segments, monkeypatch):
    right = ssd.ssd_triton
    monkeypatch.setattr(ssd, "ssd_triton", lambda *a: (lambda y, state: (2 * y, state))(*right(*a)))
    answer = worker.ANSWERS["measure"]
    settings = {"device": "cpu"}
    found = answer(
        settings,
        case=case().asked(),
        ceilings=CEILINGS,
        energy=False,
        checkpoint="",
        checkpoint_every_s=60,
    )
    assert found["status"] == "wrong"
    assert found["plans"] == {"ssd": [{"segments": 2}]}
    assert found["code_hash"] == code_hash("mamba2", OURS, "triton")


@interpreted
def test_each_side_of_a_comparison_has_its_own_plans(two_segments, monkeypatch):
    def observe(functions, **options):
        assert ssd.plan is two_segments
        return dict.fromkeys(functions, SEEN)

    monkeypatch.setattr(timing, "affordable_rounds", lambda functions, device: 8)
    monkeypatch.setattr(timing, "observe_interleaved", observe)
    cases = [case(implementation=name) for name in (OURS, AGAIN)]
    cases += [case(backend="torch", implementation=AGAIN)]
    found = versus.measure(cases, "cpu", CEILINGS)
    assert [result["status"] for result in found] == ["ok"] * 3
    assert [result["plans"] for result in found] == [{"ssd": [{"segments": 2}]}] * 2 + [{}]


def test_a_record_holds_the_plans_of_kernels_and_of_nothing_else():
    launcher = Launcher(Settings(), "session")
    process = SimpleNamespace(environment={}, process=SimpleNamespace(pid=1))

    def place(backend, **reply):
        reply = {"status": "oom", "reason": "full", "code_hash": "0", **reply}
        return launcher._measurement(case(backend=backend), process, reply).environment

    chosen = {"ssd": [{"segments": 4}]}
    assert place("triton", plans=chosen)["plans"] == chosen
    assert place("triton")["plans"] is None  # its worker died
    assert "plans" not in place("torch", plans={})


# The interpreter.


@pytest.mark.parametrize(
    "asked",
    [case(), case("block"), case("model", "decode"), case("model", "train_step")]
    + [case(backend="torch", implementation=name) for name in ("mamba_ssm", "fla")],
    ids=lambda asked: asked.label,
)
def test_the_interpreter_is_never_measured(asked, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    alone = attempt(lambda: cost.measure(asked, "cpu", CEILINGS))
    (beside,) = versus.measure([asked], "cpu", CEILINGS)
    for found in (alone, beside):
        assert found["status"] == "unsupported"
        assert "interpreter mean nothing: unset TRITON_INTERPRET" in found["reason"]
        assert "metrics" not in found


def test_what_runs_no_kernel_is_measured_all_the_same(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(timing, "observe", lambda function, **options: SEEN)
    assert cost.measure(case(backend="torch"), "cpu", CEILINGS)[0]["time_ms_p50"] == 1.0


def test_kernels_without_a_gpu_are_unsupported_in_one_line(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = attempt(lambda: cost.measure(case(), "cpu", CEILINGS))
    assert found["status"] == "unsupported"
    assert "BackendUnavailableError: ssd: backend 'triton' needs an NVIDIA GPU" in found["reason"]
    assert "\n" not in found["reason"]


def test_a_sweep_of_kernels_in_the_interpreter_has_records_and_no_times(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(Launcher, "measure_ceilings", lambda self, dtypes: CEILINGS)
    both = [case(), case(backend="torch")]
    table = cost.run(both, tmp_path, device="cpu")
    statuses = dict(zip(table["backend"], table["status"], strict=True))
    assert statuses == {"triton": "unsupported", "torch": "ok"}
    for found in record.load(tmp_path)[0]:
        asked = found.case
        assert asdict(asked) in [asdict(c) for c in both]
        assert found.environment["code_hash"] == code_hash("mamba2", OURS, asked.backend)
        assert ("plans" in found.environment) == (asked.backend == "triton")
    stood = []
    cost.run(both, tmp_path, device="cpu", on_finish=lambda found, known: stood.append(known))
    assert stood == [True, True]
