import json
import math

import pytest

from harness import record
from harness.record import Case, Measurement

CASE = Case(
    kind="cost", arch="mamba2", level="op", phase="forward", batch=1, seq_len=256, size="d256"
)
ENVIRONMENT = {"device": "a CPU", "cores": 2, "kernel_hash": "0"}


def ok(case=CASE, **metrics):
    return Measurement(case=case, status="ok", environment=ENVIRONMENT, metrics=metrics)


def variant(**changes):
    return Case(**{**CASE.__dict__, **changes})


def test_a_record_comes_back_as_it_was_written(tmp_path):
    measurement = Measurement(
        case=variant(options={"steps": 3}),
        status="oom",
        reason="too large",
        environment=ENVIRONMENT,
        metrics={"peak_bytes": None, "time_ms_p50": 1.5},
        samples={"time_ms": [1.0, 2.0]},
    )
    record.write(tmp_path, measurement)
    assert record.read(tmp_path) == [measurement]


def test_the_key_is_the_identity():
    assert variant().key == CASE.key
    for change in ({"seq_len": 512}, {"arch": "rwkv7"}, {"replicate": 1}, {"options": {"a": 1}}):
        assert variant(**change).key != CASE.key
    assert variant(options={"a": 1, "b": 2}).key == variant(options={"b": 2, "a": 1}).key


def test_the_latest_attempt_counts_and_earlier_files_stay(tmp_path):
    first = record.write(tmp_path, ok(time_ms_p50=1.0))
    before = first.read_bytes()
    record.write(tmp_path, ok(time_ms_p50=2.0))
    (found,) = record.read(tmp_path)
    assert found.metrics["time_ms_p50"] == 2.0
    assert first.read_bytes() == before
    assert len(list((tmp_path / "records").iterdir())) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_never_written(tmp_path, value):
    with pytest.raises(ValueError, match="JSON compliant"):
        record.write(tmp_path, ok(time_ms_p50=value))
    assert list(tmp_path.rglob("*.json")) == []


def test_an_unfinished_file_is_not_read(tmp_path):
    path = record.write(tmp_path, ok())
    path.with_name("half.tmp").write_text('{"case": ')
    assert len(record.read(tmp_path)) == 1


def test_another_schema_is_refused_by_name(tmp_path):
    path = record.write(tmp_path, ok())
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "schema": 99}))
    with pytest.raises(ValueError, match=f"{path.name}: schema 99"):
        record.read(tmp_path)


def test_unknown_status_is_refused():
    with pytest.raises(ValueError, match="fine"):
        Measurement(case=CASE, status="fine", environment={})


def test_same_place_needs_device_and_code():
    here = record.environment()
    assert record.same_place(here, dict(here))
    for key in ("device", "threads", "torch", "kernel_hash"):
        assert not record.same_place(here, {**here, key: "other"})


def test_environment_is_complete():
    here = record.environment()
    for key in (*record.FINGERPRINT, "kernel_hash", "utc"):
        assert here[key], key
    json.dumps(here, allow_nan=False)


def test_kernel_hash_follows_the_sources(tmp_path, monkeypatch):
    import archs

    for name in ("__init__.py", "ops.py"):
        (tmp_path / name).write_text("a = 1\n")
    monkeypatch.setattr(archs, "__file__", str(tmp_path / "__init__.py"))
    before = record.kernel_hash()
    assert record.kernel_hash() == before
    (tmp_path / "ops.py").write_text("a = 2\n")
    assert record.kernel_hash() != before
