import pytest

from harness import check, processes, self_test
from harness.judged import Row
from harness.processes import Asked, Listed, Side
from harness.verdicts import Verdict
from test_check import told

CELLS = ["a", "b", "c"]
SIDE = Side(name="now")


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    monkeypatch.setattr(processes, "listed", lambda side, asked: Listed(CELLS, {}))


def rates(monkeypatch, *rounds, noise=0.01, compared=6):
    left = told(monkeypatch, *rounds, noise=noise)
    found = self_test.run(SIDE, Asked(), compared=compared)
    assert left == []
    return found


SLOWED = [dict.fromkeys(CELLS, 1.2), dict.fromkeys(CELLS, 1.2)]
LESS = [dict.fromkeys(CELLS, 1.1), dict.fromkeys(CELLS, 1.1)]


def test_a_sound_check_is_said_to_be(monkeypatch):
    found = rates(monkeypatch, {}, {}, *SLOWED, *LESS)
    assert found.sound
    assert (found.rows, found.gating, found.slowed) == (6, 6, {0.2: 3, 0.1: 3})
    assert found.missed == {0.2: [], 0.1: []}
    assert found.document()["missed"] == {"0.2": [], "0.1": []}
    assert found.lines()[-1] == "sound"
    assert "0 false alarms in 6" in found.lines()[1]


def test_a_false_alarm_is_not_sound(monkeypatch):
    found = rates(monkeypatch, {"b": 1.3}, {"b": 1.3}, {}, *SLOWED, *LESS)
    assert (found.alarms, found.sound) == (["b"], False)
    assert "false alarm: b" in found.lines()
    assert found.lines()[-1] == "NOT SOUND"


def test_an_alarm_that_is_not_confirmed_is_none(monkeypatch):
    found = rates(monkeypatch, {"b": 1.3}, {}, {}, *SLOWED, *LESS)
    assert (found.alarms, found.unconfirmed, found.sound) == ([], 1, True)


def test_a_cell_that_fails_is_an_alarm(monkeypatch):
    found = rates(monkeypatch, {"b": "crashed"}, {}, *SLOWED, *LESS)
    assert (found.alarms, found.sound) == (["b"], False)


def test_a_slow_down_that_is_missed_is_not_sound_and_a_small_one_is_told(monkeypatch):
    found = rates(monkeypatch, {}, {}, {"a": 1.2, "b": 1.2}, {"a": 1.2, "b": 1.2}, *LESS)
    assert (found.missed, found.sound) == ({0.2: ["c"], 0.1: []}, False)
    assert "made 20% slower: 2 of 3 found; not c" in found.lines()
    found = rates(monkeypatch, {}, {}, *SLOWED, {})
    assert (found.missed[0.1], found.sound) == (CELLS, True)


def test_rates_are_of_cells_that_gate(monkeypatch):
    said = iter([Verdict.SAME, Verdict.REGRESSION, Verdict.REGRESSION])

    def compare(*_):
        verdict = next(said)
        noisy = Verdict.TRACK_ONLY if verdict == Verdict.SAME else verdict  # by its bounds
        return [
            Row(name="a", verdict=verdict, old_ms=1.0, noise=0.01),
            Row(name="b", verdict=noisy, old_ms=1.0, noise=0.1),
            Row(name="c", verdict=noisy, old_ms=0.009, noise=0.01),
        ]

    monkeypatch.setattr(check, "compare", compare)
    found = self_test.run(SIDE, Asked(), compared=1)
    assert (found.rows, found.gating, found.sound) == (3, 1, True)
    assert (found.slowed, found.missed) == ({0.2: 1, 0.1: 1}, {0.2: [], 0.1: []})


def test_where_no_cell_gates_nothing_is_tested(monkeypatch):
    told(monkeypatch, {}, noise=0.3)
    with pytest.raises(ValueError, match="no cell gates here: noise"):
        self_test.run(SIDE, Asked())
    with pytest.raises(ValueError, match="unknown cell 'd'"):
        self_test.run(SIDE, Asked(), ["d"])
