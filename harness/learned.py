"""What training runs say: the best learning rate of each point, its loss or accuracy, and laws.

Runs that differ in learning rate and seed only are one point, and a point stands for its best rate.
Points that belong side by side are one study. Runs that did not finish stay in every table.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

from harness import curves, record, report
from harness.laws import Array
from harness.loss_laws import FEWEST_SEEDS, Interval
from harness.points import CONFIDENCE
from harness.record import CANONICAL, Measurement
from harness.sizes import TOLERANCE, WIDTH, width_fields
from harness.sweep import in_order

VALUE = {"loss": "val_loss_bits_per_byte", "recall": "accuracy"}  # what a run of a kind is for
DONE, DIVERGED = "ok", "diverged"
# Options of the cases, and what stands for them where a record has none.
OPTIONS: dict[str, Any] = {
    "corpus": None,
    "unit": "byte",
    "task": None,
    "steps": None,
    "learning_rate": None,
    "stop_at": 1.0,
    "validation_tokens": None,
    "validation_block": None,
    "ranks": 1,
    "parallel": None,
}
# Metrics that tables and figures read, beside `VALUE`.
METRICS = (
    "params", "state_bytes", "train_s", "train_flops", "foreign_load", "corpus_sha256",
    "bigram_entropy_bits_per_byte", "val_loss_nats_per_char", "chance", "steps_taken",
    "forward_time_ms_p50_a_sequence", "forward_foreign_load",
)  # fmt: skip
PLACE = ("dtype", "backend", "implementation", "device", "threads", "ranks", "parallel")
# Runs that differ in one of these are never in one study; of losses, sizes, too, unless matched.
APART = {
    "loss": ("corpus", "unit", "tokens", "validation_tokens", "validation_block", "evaluate_at"),
    "recall": ("task", "steps", "stop_at", "evaluate_at"),
}
SIZED = {"head_dim": "heads of", "d_state": "N ="}  # what a size says beside the width
POINT = ("arch", "size", "seq_len", "batch", "asked")


@dataclass(frozen=True, eq=False)  # tables do not compare to one truth
class Rate:
    """The runs of a point at one learning rate: its seeds.

    Attributes:
        learning_rate: the peak.
        runs: rows of `runs`.
    """

    learning_rate: float
    runs: pd.DataFrame

    @cached_property
    def finished(self) -> pd.DataFrame:
        """The runs that have a value, by seed."""
        return self.runs[self.runs["value"].notna()].sort_values("seed")

    @property
    def values(self) -> dict[int, float]:
        """Loss in bits a byte, or accuracy, by seed."""
        values = self.finished["value"].astype(float)
        return dict(zip(self.finished["seed"], values, strict=True))

    @property
    def diverged(self) -> int:
        """How many runs diverged."""
        return int((self.runs["status"] == DIVERGED).sum())

    @property
    def unfinished(self) -> str:
        """How many runs ended without a value, and why: "2 diverged, 1 oom"."""
        return _counted(self.runs)

    @property
    def mean(self) -> float:
        """Over seeds; NaN where none finished."""
        return self.mean_of("value")

    def mean_of(self, column: str) -> float:
        """The mean of a number over the runs that finished; NaN where none has it."""
        return float(pd.to_numeric(self.finished[column]).mean())


@dataclass(frozen=True, eq=False)  # tables do not compare to one truth
class Point:
    """Runs that differ in learning rate and seed only.

    Attributes:
        kind: "loss" or "recall".
        arch: the architecture.
        size: as of a case.
        seq_len: T of the training sequences.
        batch: sequences a step.
        settings: of the task; empty for losses.
        block: fields of its blocks' `Config` that were given.
        rates: every learning rate, rising.
    """

    kind: str
    arch: str
    size: str
    seq_len: int
    batch: int
    settings: Mapping[str, Any]
    block: Mapping[str, Any]
    rates: tuple[Rate, ...]

    @property
    def variant(self) -> str:
        """The heads, the state and the fields of its blocks that were given, in words."""
        sized = [f"{SIZED[name]} {value}" for name, value in width_fields(self.size).items()]
        return ", ".join([*sized, *filter(None, [said_block(self.block)])])

    @cached_property
    def best(self) -> Rate | None:
        """The rate with the best mean over its seeds; None where no run finished.

        A rate at which a seed diverged is taken only where there is no other.
        """
        finished = [rate for rate in self.rates if len(rate.finished)]
        sound = [rate for rate in finished if not rate.diverged] or finished
        sign = 1 if self.kind == "loss" else -1
        return min(sound, key=lambda rate: sign * rate.mean, default=None)

    @property
    def tried(self) -> list[float]:
        """The learning rates of which something is known: a value, or that a run diverged."""
        return [r.learning_rate for r in self.rates if len(r.finished) or r.diverged]

    @property
    def edge(self) -> str:
        """A warning where the grid of rates ends at the best, or "".

        An accuracy at which runs stop cannot become better.
        """
        if self.best is None:
            return ""
        if self.kind == "recall" and self.best.mean >= self.best.mean_of("stop_at"):
            return ""
        if len(self.tried) == 1:
            return "only rate tried"
        at_end = self.best.learning_rate in (self.tried[0], self.tried[-1])
        return "edge of the grid" if at_end else ""

    @property
    def interval(self) -> Interval:
        """The mean of the best rate with its 95 % interval over seeds; NaN without a best rate."""
        if self.best is None:
            return Interval(math.nan)
        found = of_mean(list(self.best.values.values()))
        if self.kind == "loss" or found.low is None or found.high is None:
            return found
        return Interval(found.value, max(found.low, 0.0), min(found.high, 1.0))

    @property
    def unfinished(self) -> str:
        """How many runs, at all rates, ended without a value, and why."""
        return _counted(pd.concat([rate.runs for rate in self.rates]))

    def mean_of(self, column: str) -> float:
        """The mean of a number over the seeds of the best rate; NaN where there is none."""
        return math.nan if self.best is None else self.best.mean_of(column)


@dataclass(frozen=True, eq=False)  # tables do not compare to one truth
class Study:
    """Points that belong side by side.

    Attributes:
        kind: "loss" or "recall".
        common: what the runs have in common: `APART`, `PLACE`, batch; of losses, size too.
        runs: rows of `runs`.
        samples: of each run, by its key.
    """

    kind: str
    common: Mapping[str, Any]
    runs: pd.DataFrame
    samples: Mapping[str, Mapping[str, list[float]]] = field(repr=False)

    @cached_property
    def points(self) -> list[Point]:
        """By size, task settings and length; architectures side by side, by menu."""
        found = []
        for _, part in self.runs.groupby(list(POINT), sort=False, dropna=False):
            case = part.iloc[0].to_dict()
            rates = part.groupby("learning_rate", sort=True, dropna=False)
            found.append(
                Point(
                    kind=self.kind,
                    arch=str(case["arch"]),
                    size=str(case["size"]),
                    seq_len=int(case["seq_len"]),
                    batch=int(case["batch"]),
                    settings=json.loads(case["settings"]),
                    block=json.loads(case["block"]),
                    rates=tuple(Rate(float(str(rate)), of_rate) for rate, of_rate in rates),
                )
            )
        order = in_order(point.arch for point in found)
        sizes = list(dict.fromkeys(model_size(size) for size in self.runs["size"]))
        return sorted(
            found,
            key=lambda p: (
                0 if self.kind == "loss" else sizes.index(model_size(p.size)),
                p.seq_len,
                _rank(p.settings),
                order.index(p.arch),
                said_block(p.block),
            ),
        )

    @property
    def finished(self) -> list[Point]:
        """The points that have a value."""
        return [point for point in self.points if point.best is not None]

    @property
    def lengths(self) -> list[int]:
        """Every T that was trained at and finished."""
        return sorted({point.seq_len for point in self.finished})

    def samples_of(self, point: Point, *names: str) -> list[list[Array]]:
        """These samples of each seed at the best rate, in order; a run that lacks one is left out.

        Returns, for each run, an array for each name.
        """
        if point.best is None:
            return []
        found = [self.samples.get(key, {}) for key in point.best.finished["key"]]
        return [
            [np.asarray(of_run[name], dtype=float) for name in names]
            for of_run in found
            if all(of_run.get(name) for name in names)
        ]

    @property
    def archs(self) -> list[str]:
        """Architectures, finished or not."""
        return in_order(self.runs["arch"])

    @property
    def varying(self) -> list[str]:
        """The settings of the task that are not the same in all points."""
        names = dict.fromkeys(name for point in self.points for name in point.settings)
        return [n for n in names if len({str(p.settings.get(n)) for p in self.points}) > 1]

    @property
    def fields(self) -> list[str]:
        """The fields of blocks that were given at some point."""
        return list(dict.fromkeys(name for point in self.points for name in point.block))

    @property
    def several_sizes(self) -> bool:
        """Whether the sizes must be named to tell the points apart."""
        return self.runs["size"].nunique() > 1

    @property
    def bigram_entropy(self) -> float | None:
        """Of the validation text in bits a byte, where it is recorded."""
        known = self.runs["bigram_entropy_bits_per_byte"].dropna()
        return float(known.iloc[0]) if len(known) else None

    @property
    def chance(self) -> float | None:
        """Accuracy of guessing; None where the points differ in it, or none finished."""
        known = set(self.runs["chance"].dropna())
        return float(known.pop()) if len(known) == 1 else None

    @property
    def title(self) -> str:
        """One line."""
        common = self.common
        where = f"{common['batch']}, {common['dtype']}, {common['backend']}"
        if self.kind == "loss":
            said = (
                f"Language models on {common['corpus']}, by {common['unit']}: {said_size(self)}, "
                f"{report.number(common['tokens'])} tokens, {where}"
            )
            entropy = self.bigram_entropy
            if entropy is not None:
                said += f"; bigram entropy of the validation text {entropy:.2f} bits a byte"
            return said
        fixed = [
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self.points[0].settings.items()
            if name not in self.varying
        ]
        settings = f" ({', '.join(fixed)})" if fixed else ""
        steps = f"at most {report.number(common['steps'])} steps"
        said = f"Task {common['task']}{settings}: {steps}, {where}"
        return said if self.chance is None else f"{said}; chance {self.chance:.3f}"

    @property
    def origin(self) -> str:
        """Device, versions and commit behind the runs, in one line."""
        return curves.origin(self.runs)


def runs(cells: pd.DataFrame) -> pd.DataFrame:
    """The training runs among the rows of `harness.report.frame`, their options as columns.

    The column value is the loss in bits a byte, or the accuracy; null where the run did not finish.
    asked holds all options but the learning rate, settings those of the task, block the fields of
    the blocks, as JSON.
    """
    if cells.empty:
        return cells
    part = cells[cells["kind"].isin(VALUE)].reset_index(drop=True)
    options = [json.loads(text) for text in part["options"]]
    names = [*OPTIONS, "settings", "block", "evaluate_at", "asked"]
    part = part.drop(columns=[name for name in names if name in part])
    added = {name: [o.get(name, default) for o in options] for name, default in OPTIONS.items()}
    added |= {
        "settings": [CANONICAL.encode(o.get("settings", {})) for o in options],
        "block": [CANONICAL.encode(o.get("block", {})) for o in options],
        "evaluate_at": [CANONICAL.encode(o.get("evaluate_at", [])) for o in options],
        "asked": [CANONICAL.encode(_without_rate(o)) for o in options],
    }
    part = part.assign(**added)
    for name in {*METRICS, *VALUE.values()} - {*part.columns}:  # no run reached it
        part[name] = math.nan
    part["steps"] = part["steps"].astype(float)
    part["tokens"] = part["steps"] * part["batch"] * part["seq_len"]
    values = [row[VALUE[str(row["kind"])]] for row in part.to_dict("records")]
    finished = part["status"] == DONE
    part["value"] = pd.Series(values, index=part.index, dtype=float).where(finished)
    return part


def studies(cells: pd.DataFrame, measurements: Sequence[Measurement] = ()) -> list[Study]:
    """The training runs of `harness.report.frame` by what belongs side by side.

    Args:
        cells: of any kind.
        measurements: those behind the cells, where figures are to be drawn of their samples.
    """
    table = runs(cells)
    samples = {m.case.key: m.samples for m in measurements if m.case.kind in VALUE}
    found = []
    for kind, apart in APART.items():
        mine = table[table["kind"] == kind] if len(table) else table
        if mine.empty:
            continue
        keys = [*apart, *PLACE]
        for values, part in mine.groupby(keys, sort=False, dropna=False):
            common = dict(zip(keys, values, strict=True))
            for size, alike in _matched(part) if kind == "loss" else [("", part)]:
                for batch, same in report.schemes(alike):
                    said = {**common, "size": size, "batch": batch}
                    found.append(Study(kind, said, same, samples))
    return found


def load(source: Path) -> list[Study]:
    """The studies of a run directory or packed file.

    Raises:
        FileNotFoundError: there is neither.
    """
    return studies(report.frame(source), record.load(source)[0])


def points(found: Sequence[Study]) -> pd.DataFrame:
    """Every point with its best learning rate, one row each.

    value is the mean over n seeds of the loss in bits a byte, or of the accuracy; low and high are
    its 95 % interval, null under three seeds.
    """
    rows = []
    for study in found:
        for point in study.points:
            best, interval = point.best, point.interval
            rows.append(
                {
                    **_identity(study, point),
                    "value": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "n": 0 if best is None else len(best.values),
                    "learning_rate": None if best is None else best.learning_rate,
                    "rates_tried": len(point.tried),
                    "edge": point.edge,
                    "diverged": sum(rate.diverged for rate in point.rates),
                    "unfinished": point.unfinished,
                    **{name: point.mean_of(name) for name in METRICS if name != "corpus_sha256"},
                }
            )
    return pd.DataFrame(rows)


def grid(found: Sequence[Study]) -> pd.DataFrame:
    """Every learning rate of every point, one row each, with the mean over n seeds."""
    return pd.DataFrame(
        [
            {
                **_identity(study, point),
                "learning_rate": rate.learning_rate,
                "value": rate.mean,
                "n": len(rate.values),
                "diverged": rate.diverged,
                "unfinished": rate.unfinished,
                "best": rate is point.best,
            }
            for study in found
            for point in study.points
            for rate in point.rates
        ]
    )


def of_mean(values: Sequence[float]) -> Interval:
    """The mean, from three values on with Student's 95 % interval."""
    mean = float(np.mean(values))
    if len(values) < FEWEST_SEEDS:
        return Interval(mean)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def said_size(study: Study) -> str:
    """The size, or the matched sizes, of a study in words."""
    sizes = str(study.common["size"]).split(" / ")
    return " / ".join(size_in_words(size) for size in sizes)


def said_block(block: Mapping[str, Any]) -> str:
    """Fields of blocks in words."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in block.items())


def size_in_words(size: str) -> str:
    """A size of a case: "d64" is "width 64", "1M" is "1M parameters"."""
    match = WIDTH.fullmatch(size)
    if match is None:
        return f"{size} parameters"
    return f"width {match['width']}" if size == f"d{match['width']}" else f"size {size}"


def model_size(size: str) -> str:
    """A size in words, whatever heads and states it has: "d64n16" is "width 64"."""
    match = WIDTH.fullmatch(size)
    if match is None:
        return size_in_words(size)
    depth = f", {match['depth']} blocks" if match["depth"] else ""
    return f"width {match['width']}{depth}"


def _identity(study: Study, point: Point) -> dict[str, Any]:
    own = {"arch": point.arch, "size": point.size, "seq_len": point.seq_len, "batch": point.batch}
    return {"kind": study.kind, **study.common, **own, **point.settings, **point.block}


def _without_rate(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "learning_rate"}


def _rank(settings: Mapping[str, Any]) -> list[tuple[bool, float, str]]:
    """What puts settings in order: numbers by value, other values by name."""
    number = (int, float)
    return [
        (True, float(v), "") if isinstance(v, number) else (False, 0.0, str(v))
        for v in settings.values()
    ]


def _counted(part: pd.DataFrame) -> str:
    failed = Counter(part[part["value"].isna()]["status"])
    return ", ".join(f"{count} {status}" for status, count in sorted(failed.items()))


def _matched(part: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Runs by size; sizes of different architectures with equally many parameters are one."""
    params = pd.to_numeric(part["params"]).groupby(part["size"]).mean().sort_values()
    archs = part.groupby("size")["arch"].agg(set)
    groups: list[list[str]] = []
    for size in map(str, params.index):
        joined = groups[-1] if groups else []
        alike = joined and abs(params[size] / params[joined[0]] - 1) <= 2 * TOLERANCE
        if alike and not any(archs[size] & archs[other] for other in joined):
            joined.append(size)
        else:
            groups.append([size])
    for sizes in groups:
        yield " / ".join(sizes), part[part["size"].isin(sizes)]
