"""What a check found, cell by cell; as a table, JSON, JUnit, Markdown and annotations."""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from harness.report import number
from harness.sweep import unknown
from harness.verdicts import RED, Change, Verdict, exit_code
from harness.worker import one_line

if TYPE_CHECKING:
    from rich.table import Table

HEADER = ("cell", "verdict", "old, ms", "new, ms", "new / old", "99 % bounds", "counts from", "why")
UNPRINTABLE = {i: None for i in range(32) if chr(i) not in "\t\n"}  # not allowed in XML 1.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell.

    Attributes:
        name: of the cell.
        verdict: what became of it.
        change: new over old, where both were measured.
        old_ms: median of the old processes.
        new_ms: of the new ones.
        noise: of the cell against itself, as a share.
        limit: the ratio that a change must exceed to count.
        why: what else there is to say: a status and a reason, say.
    """

    name: str
    verdict: Verdict
    change: Change | None = None
    old_ms: float | None = None
    new_ms: float | None = None
    noise: float | None = None
    limit: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Report:
    """All cells of a check.

    Attributes:
        title: what was compared with what.
        rows: worst first.
        about: device, versions, commits.
    """

    title: str
    rows: Sequence[Row]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """As `harness.verdicts.exit_code`."""
        return exit_code(row.verdict for row in self.rows)

    @property
    def summary(self) -> str:
        """One line: how many cells have which verdict."""
        if not self.rows:
            return "nothing was compared: there is no cell"
        counts = Counter(row.verdict for row in self.rows)
        said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
        return f"{said}: nothing could be compared" if self.exit_code == 3 else said


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """By verdict, and by how much slower."""
    order = list(Verdict)

    def rank(row: Row) -> tuple[int, float]:
        return order.index(row.verdict), -(row.change.ratio if row.change else math.inf)

    return sorted(rows, key=rank)


def chosen(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that match a pattern, in order; all where there is none."""
    if not patterns:
        return list(names)
    return [n for n in names if any(n == p or fnmatch.fnmatchcase(n, p) for p in patterns)]


def refuse_unknown(patterns: Sequence[str], names: Sequence[str]) -> None:
    """ValueError for a pattern that no name matches, where there are names."""
    for pattern in patterns:
        if names and not chosen(names, [pattern]):
            raise ValueError(unknown("cell", pattern, names))


def table(report: Report) -> Table:
    """For a terminal: all that was timed, and of what was counted all that is not the same."""
    from rich.table import Table
    from rich.text import Text

    shown = [row for row in report.rows if row.change or row.verdict != Verdict.SAME]
    told = [_told(row) for row in shown]
    made = Table(title=Text(report.title), title_justify="left")
    said = [any(cells[i] not in ("-", "") for cells in told) for i in range(len(HEADER))]
    kept = [i for i in range(len(HEADER)) if i < 2 or said[i]]
    for i in kept:
        words = HEADER[i] in ("cell", "verdict", "why")
        made.add_column(HEADER[i], justify="left" if words else "right", overflow="fold")
    for row, cells in zip(shown, told, strict=True):
        style = "red" if row.verdict in RED else ""
        made.add_row(*(Text(cells[i]) for i in kept), style=style)
    return made


def as_json(report: Report) -> dict[str, Any]:
    """Everything, for programs."""
    rows = [{**asdict(row), "verdict": str(row.verdict)} for row in report.rows]
    return {
        "schema": 1,
        "title": report.title,
        "exit_code": report.exit_code,
        "summary": report.summary,
        "about": dict(report.about),
        "cells": rows,
    }


def junit(report: Report) -> str:
    """JUnit XML: a red cell is a failure, one that says nothing is skipped."""
    if report.exit_code == 3:
        return junit_of_failure(report.summary)
    failures = sum(row.verdict in RED for row in report.rows)
    skipped = [row for row in report.rows if row.verdict in (Verdict.TRACK_ONLY, Verdict.NEW)]
    suite = ElementTree.Element(
        "testsuite",
        name="seqscale check",
        tests=str(len(report.rows)),
        failures=str(failures),
        skipped=str(len(skipped)),
    )
    for row in report.rows:
        case = ElementTree.SubElement(
            suite, "testcase", classname="seqscale.check", name=_xml(row.name)
        )
        said = _xml(_sentence(row))
        if row.verdict in RED:
            failure = ElementTree.SubElement(case, "failure", message=said, type=str(row.verdict))
            failure.text = said
        elif row in skipped:
            ElementTree.SubElement(case, "skipped", message=said)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def junit_of_failure(why: str) -> str:
    """JUnit XML where nothing could be compared."""
    suite = ElementTree.Element("testsuite", name="seqscale check", tests="1", errors="1")
    case = ElementTree.SubElement(suite, "testcase", classname="seqscale.check", name="comparison")
    ElementTree.SubElement(case, "error", message=_xml(why))
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def markdown(report: Report) -> str:
    """For the summary of a CI run."""
    lines = [f"## {_cell(report.title)}", "", _cell(report.summary), ""]
    for row in [HEADER, ["---"] * len(HEADER), *map(_told, report.rows)]:
        lines.append(f"| {' | '.join(map(_cell, row))} |")
    return "\n".join(lines) + "\n"


def workflow_commands(report: Report) -> list[str]:
    """GitHub workflow commands: an error for each red cell."""
    return [
        f"::error title={_command(f'{row.verdict} {one_line(row.name)}', title=True)}::"
        f"{_command(_sentence(row))}"
        for row in report.rows
        if row.verdict in RED
    ]


def _told(row: Row) -> list[str]:
    change = row.change
    return [
        one_line(row.name),
        str(row.verdict),
        "-" if row.old_ms is None else number(row.old_ms),
        "-" if row.new_ms is None else number(row.new_ms),
        "-" if change is None else f"{change.ratio:.3f}",
        "-" if change is None else f"{change.low:.3f} … {change.high:.3f}",
        "-" if row.limit is None else f"{row.limit:.3f}",
        one_line(row.why),
    ]


def _sentence(row: Row) -> str:
    said = f"{row.name}: {row.verdict}"
    if row.change is not None:
        said += (
            f", new / old {row.change.ratio:.3f} ({row.change.low:.3f} to {row.change.high:.3f}, "
            f"{row.change.processes} processes a side)"
        )
    return one_line(f"{said}; {row.why}" if row.why else said, 2000)


def _xml(text: str) -> str:
    return one_line(text.translate(UNPRINTABLE), 2000)


def _cell(text: str) -> str:
    """Text that is nothing but text in a Markdown table."""
    found = " ".join(text.split()).replace("\\", "\\\\").replace("&", "&amp;")
    for sign in "|<>*_`[]":
        found = found.replace(sign, f"\\{sign}" if sign not in "<>" else f"&{'lg'[sign == '>']}t;")
    return found


def _command(text: str, *, title: bool = False) -> str:
    """Text as a workflow command takes it."""
    found = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return found.replace(":", "%3A").replace(",", "%2C") if title else found
