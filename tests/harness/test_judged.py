import io
import json
from xml.etree import ElementTree

import pytest
from rich.console import Console

from harness import judged, worker
from harness.judged import Report, Row
from harness.verdicts import Change, Verdict

SLOW = Change(ratio=1.3, low=1.2, high=1.4, processes=12)
NASTY = 'a</testcase>"\x1b[31m%0A::error::x,y:z|`=cmd()`\n<script>'


def row(name="ssd", verdict=Verdict.SAME, change=None, **more):
    return Row(name=name, verdict=verdict, change=change, **more)


@pytest.fixture
def found():
    rows = [
        row("same"),
        row("new", Verdict.NEW),
        row("slow", Verdict.REGRESSION, SLOW, old_ms=10.0, new_ms=13.0, limit=1.05),
        row("slower", Verdict.REGRESSION, Change(ratio=2, low=1.9, high=2.1, processes=12)),
        row("gone", Verdict.MISSING, why="no more"),
        row(NASTY, Verdict.FAILED, why=NASTY),
    ]
    return Report("now beside main", judged.worst_first(rows))


def test_the_worst_comes_first(found):
    assert [r.name for r in found.rows] == ["slower", "slow", NASTY, "gone", "new", "same"]


def test_the_summary_counts_verdicts(found):
    assert found.summary == "2 REGRESSION, 1 FAILED, 1 MISSING, 1 NEW, 1 SAME"
    assert found.exit_code == 1
    assert Report("", []).summary == "nothing was compared: there is no cell"
    nothing = Report("", [row(verdict=Verdict.TRACK_ONLY)])
    assert nothing.summary == "1 TRACK-ONLY: nothing could be compared"


def test_the_table_has_the_interval(found):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(judged.table(found))
    text = console.export_text()
    assert "1.300" in text
    assert "1.200 … 1.400" in text
    assert "\x1b" not in text


def test_the_table_of_counts_has_what_is_not_the_same():
    rows = [row("kept"), row("spills", Verdict.REGRESSION, why="spills 0 -> 8")]
    made = judged.table(Report("counted", rows))
    assert [column.header for column in made.columns] == ["cell", "verdict", "why"]
    assert [text.plain for text in made.columns[0].cells] == ["spills"]


def test_json_holds_all(found):
    document = json.loads(json.dumps(judged.as_json(found), allow_nan=False))
    assert document["exit_code"] == 1
    assert document["cells"][1] == {
        "name": "slow",
        "verdict": "REGRESSION",
        "change": {"ratio": 1.3, "low": 1.2, "high": 1.4, "processes": 12},
        "old_ms": 10.0,
        "new_ms": 13.0,
        "noise": None,
        "limit": 1.05,
        "why": "",
    }


def test_junit_has_a_failure_for_each_red_cell(found):
    suite = ElementTree.fromstring(judged.junit(found))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("6", "4", "1")
    failed = [case for case in suite if case.find("failure") is not None]
    assert [case.get("name") for case in failed][:2] == ["slower", "slow"]
    assert "new / old 1.300 (1.200 to 1.400" in failed[1].find("failure").get("message")
    assert len(suite) == 6  # a name breaks out of nothing


def test_junit_of_nothing_is_an_error():
    suite = ElementTree.fromstring(judged.junit(Report("", [])))
    assert suite.get("errors") == "1"
    assert "there is no cell" in suite[0].find("error").get("message")


def test_markdown_is_one_line_a_cell(found):
    lines = judged.markdown(found).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 6
    columns = len(judged.HEADER) + 1
    assert all(line.replace("\\|", "").count("|") == columns for line in rows)
    assert "<script>" not in judged.markdown(found)


def test_markdown_shows_a_name_as_it_is():
    row = Row(name="&lt;b&gt; & <b>", verdict=Verdict.SAME)
    assert "&amp;lt;b&amp;gt; &amp; &lt;b&gt;" in judged.markdown(Report("", [row]))


def test_annotations_cannot_be_forged(found):
    lines = judged.workflow_commands(found)
    assert len(lines) == 4
    assert all(line.startswith("::error title=") and "\n" not in line for line in lines)
    assert lines[0].startswith("::error title=REGRESSION slower::slower: REGRESSION")
    # A title ends at the first "::", and what it says of itself at a comma.
    titles = [line.removeprefix("::error title=").partition("::")[0] for line in lines]
    assert not any(sign in title for sign in ":,\r" for title in titles)
    shown = titles[2].replace("%3A", ":").replace("%2C", ",").replace("%25", "%")
    assert shown == f"FAILED {worker.one_line(NASTY)}"
    assert "%250A" in lines[2]
