import io
import json

import pytest
from rich.console import Console

from harness import trials
from harness.progress import SweepProgress, outcome
from harness.record import Measurement
from harness.run import Worker


@pytest.fixture
def cells():
    grid = trials.LossGrid(archs=["mamba2", "hyena"], lengths=64, size="d64", batch=2, tokens=1280)
    return trials.trial_cells([grid])


def test_the_bar_advances_within_a_cell_and_never_falls_back(cells):
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with SweepProgress(cells, console) as progress:
        (task,) = progress._bar.tasks
        first, second = (progress._seconds[case.key] for case in cells)
        progress.started(cells[0])
        progress.advanced(0.25)
        assert task.completed == pytest.approx(first / 4)
        progress.finished(measured(cells[0]), known=False)
        assert task.completed == pytest.approx(first)
        progress.started(cells[1])
        progress.advanced(0.5)
        assert task.completed == pytest.approx(first + second / 2)
        progress.finished(measured(cells[1]), known=False)
        assert task.completed == pytest.approx(task.total)


def measured(case, **metrics):
    metrics = metrics or {"val_loss_bits_per_byte": 2.5}
    return Measurement(case=case, status="ok", environment={}, metrics=metrics)


def test_what_came_of_a_run_is_said_in_a_few_words(cells):
    assert outcome(measured(cells[0])) == "2.500 bits a byte"
    solved = measured(cells[0], accuracy=0.9951, steps_taken=390)
    assert outcome(solved) == "99.5% right after 390 steps"


def test_a_worker_s_progress_comes_before_its_reply():
    worker = object.__new__(Worker)
    lines = [{"progress": 0.1}, {"progress": 0.6}, {"status": "ok"}, {"progress": 0.9}]
    text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    worker._received = bytearray(text[:25])
    told = []
    assert worker._reply(told.append) is None
    assert told == [0.1]
    worker._received += text[25:]
    assert worker._reply(told.append) == {"status": "ok"}
    assert told == [0.1, 0.6]
    assert worker._received == text[text.index(b"}\n", text.index(b"ok")) + 2 :]
