import json
import math
import multiprocessing
import os
import random
import signal
import time

import pytest

from harness import record, report
from harness.record import Case, DirectoryInUseError, Measurement, RunDirectory

CASE = Case(
    kind="cost", arch="mamba2", level="op", phase="forward", batch=1, seq_len=256, size="d256"
)
TIMES = ("time_ms_p20", "time_ms_p50", "time_ms_p80")
ENVIRONMENT = {"device": "a CPU", "cores": 2, "code_hash": "0"}


def variant(**changes):
    return Case(**{**CASE.asked(), **changes})


def ok(case=CASE, **metrics):
    metrics = {**dict.fromkeys(TIMES, 1.0), **metrics}
    return Measurement(case=case, status="ok", environment=ENVIRONMENT, metrics=metrics)


def written(path, *measurements):
    with RunDirectory(path) as directory:
        return [directory.write(m) for m in measurements]


def read(path):
    measurements, damaged = record.load(path)
    assert damaged == []
    return measurements


def test_a_record_comes_back_as_it_was_written(tmp_path):
    measurement = Measurement(
        case=variant(options={"steps": 3}),
        status="oom",
        reason="too large",
        environment=ENVIRONMENT,
        metrics={"peak_bytes": None, "time_ms_p50": 1.5},
        samples={"time_ms": [1.0, 2.0]},
    )
    written(tmp_path, measurement)
    assert read(tmp_path) == [measurement]


def test_the_key_is_the_identity():
    assert variant().key == CASE.key
    for change in ({"seq_len": 512}, {"arch": "rwkv7"}, {"replicate": 1}, {"options": {"a": 1}}):
        assert variant(**change).key != CASE.key
    assert variant(options={"a": 1, "b": 2}).key == variant(options={"b": 2, "a": 1}).key


def test_the_latest_attempt_counts_and_earlier_files_stay(tmp_path):
    (first,) = written(tmp_path, ok(time_ms_p50=1.0))
    before = first.read_bytes()
    written(tmp_path, ok(time_ms_p50=2.0))
    (found,) = read(tmp_path)
    assert found.metrics["time_ms_p50"] == 2.0
    assert first.read_bytes() == before
    assert len(list((tmp_path / "records").iterdir())) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_never_written(tmp_path, value):
    with pytest.raises(ValueError, match="JSON compliant"):
        written(tmp_path, ok(time_ms_p50=value))
    assert list((tmp_path / "records").iterdir()) == []


def test_unknown_status_is_refused():
    with pytest.raises(ValueError, match="fine"):
        Measurement(case=CASE, status="fine", environment={})


def damage(text):
    document = json.loads(text)
    return {
        "truncated": (text[: len(text) // 2], "not JSON"),
        "empty": (b"", "empty"),
        "binary": (os.urandom(8) + b"\xff\xfe\x00", "not text"),
        "newer": (json.dumps({**document, "schema": 2}).encode(), "schema 2, this version reads 1"),
        "two in one": (text * 2, "not JSON"),
        "a list": (b"[1, 2]", "not a record"),
        "a field more": (json.dumps({**document, "mood": "good"}).encode(), "mood"),
        "a field less": (json.dumps({"schema": 1, "case": document["case"]}).encode(), "status"),
        "not a number": (text.replace(b"1.0", b"not JSON"), "not JSON"),
        "another case": (text.replace(b"mamba2", b"rwkv7"), "not that of its case"),
        "no case": (json.dumps({**document, "case": {}}).encode(), "not a record"),
        "metrics of no kind": (json.dumps({**document, "metrics": [1]}).encode(), "metrics is no"),
        "no environment": (json.dumps({**document, "environment": None}).encode(), "environment"),
        "a word for a time": (text.replace(b"1.0", b'"fast"'), "time_ms_p20 is 'fast'"),
        "a time below zero": (text.replace(b"1.0", b"-1.0"), "time_ms_p20 is -1.0"),
        "a table for a number": (text.replace(b"1.0", b"{}"), "metric is no number"),
        "no status": (text.replace(b'"ok"', b'"fine"'), "fine"),
    }


@pytest.mark.parametrize("kind", list(damage(b'{"case": 1}')))
def test_what_is_no_record_is_set_aside_named_and_missing(tmp_path, kind):
    path, _ = written(tmp_path, ok(time_ms_p50=1.0), ok(variant(seq_len=512), time_ms_p50=3.0))
    text, reason = damage(path.read_bytes())[kind]
    path.write_bytes(text)
    measurements, ((named, said),) = record.load(tmp_path)  # a reader moves nothing
    assert [m.case.seq_len for m in measurements] == [512]
    assert named == path
    assert reason in said
    assert path.exists()
    with RunDirectory(tmp_path) as directory:
        assert [d.path for d in directory.damaged] == [path]
        assert list(directory.latest) == [variant(seq_len=512).key]
    assert not path.exists()
    (kept,) = (tmp_path / "set-aside").iterdir()
    assert kept.read_bytes() == text
    assert read(tmp_path)


def test_files_of_the_same_name_are_all_kept_aside(tmp_path):
    for text in ("a", "b", "c"):
        (path,) = written(tmp_path, ok())
        path.write_text(text)
    written(tmp_path)
    assert sorted(p.read_text() for p in (tmp_path / "set-aside").iterdir()) == ["a", "b", "c"]


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    (path,) = written(tmp_path, ok())
    path.with_name("half.json.tmp").write_text('{"case": ')
    assert len(read(tmp_path)) == 1
    written(tmp_path)
    assert list(tmp_path.rglob("*.tmp")) == []
    assert len(read(tmp_path)) == 1


def test_a_second_writer_is_refused_with_the_pid_of_the_first(tmp_path):
    with RunDirectory(tmp_path):
        assert record.holder(tmp_path) == os.getpid()
        with pytest.raises(DirectoryInUseError, match=rf"process {os.getpid()}\b.*--out"):
            RunDirectory(tmp_path)
        assert record.holder(tmp_path) == os.getpid()
    assert record.holder(tmp_path) is None
    RunDirectory(tmp_path).close()


def test_a_directory_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        RunDirectory(tmp_path / "file" / "run")


def write_without_end(path):
    with RunDirectory(path) as directory:
        attempt = 0
        while True:
            attempt += 1
            directory.write(ok(variant(replicate=attempt), values=float(attempt)))


def test_killed_at_any_moment_every_file_parses(tmp_path):
    chance = random.Random(1)
    seen = {}
    for _ in range(20):
        writer = multiprocessing.get_context("fork").Process(
            target=write_without_end, args=(tmp_path,)
        )
        writer.start()
        time.sleep(chance.uniform(0, 0.05))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        measurements = read(tmp_path) if (tmp_path / "records").exists() else []
        assert len({m.case.key for m in measurements}) == len(measurements)
        files = {p: p.read_bytes() for p in (tmp_path / "records").glob("*.json")}
        assert all(files[path] == text for path, text in seen.items())
        seen = files
    assert len(seen) > 20


def test_ten_thousand_records_are_tabulated_in_three_seconds(tmp_path):
    (tmp_path / "records").mkdir()
    for i in range(10_000):
        case = variant(
            arch=("mamba2", "rwkv7")[i % 2], seq_len=256 << i // 2 % 8, replicate=i // 16
        )
        measurement = Measurement(
            case=case,
            status="ok",
            environment={**ENVIRONMENT, "session": "a"},
            metrics={**dict.fromkeys(TIMES, 1.0 + i % 7), "peak_bytes": i, "state_bytes": 4},
            samples={"time_ms": [1.0 + j / 7 for j in range(20)]},
        )
        path = tmp_path / "records" / f"{case.key}-001.json"
        path.write_text(record.to_json(measurement, indent=1))
    start = time.perf_counter()
    table = report.frame(tmp_path)
    assert report.tables(table)
    assert time.perf_counter() - start < 3
    assert len(table) == 10_000
