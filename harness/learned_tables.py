"""Tables of training runs, for a terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from rich.table import Table
from rich.text import Text

from harness.learned import Point, Rate, Study
from harness.learned_laws import Fitted, laws
from harness.loss_laws import FEWEST_SEEDS, Interval, IsoFlop, JointLaw, LossLaw
from harness.report import number
from harness.summary import NAMES

# What a reader of the tables must know.
LEGEND = (
    "A point is what differs in learning rate and seed only, and stands for its best rate: the "
    "best mean over seeds, of the rates at which no seed diverged, if any (0.005 of 3: the best of "
    f"three). Interval: 95 %, Student's t over seeds, not available under {FEWEST_SEEDS}; it does "
    "not hold what choosing the best rate on the same seeds adds. Edge of the grid: no rate beyond "
    "the best was tried, so a better one may exist. Laws: loss = E + A x^-alpha, x being the "
    "training length, the parameters or the tokens."
)
WHAT = {"loss": "validation loss", "recall": "accuracy"}
LAW_HEADER = (
    "architecture",
    "along",
    "at",
    "points",
    "floor E, bits a byte",
    "alpha",
    "flags",
)
COMPUTE_HEADER = ("architecture", "at", "training FLOPs", "parameters at the least loss", "flags")
WORDY = ("95 % interval", "best rate", "flags")  # columns that may wrap
Made = tuple[str, list[str], list[list[str]]]  # title, header, rows
Columns = dict[str, Callable[[Point], str]]


def tables(found: Sequence[Study]) -> list[Table]:
    """The training runs for a terminal."""
    made = []
    for study in found:
        for title, header, rows in _of_study(study):
            made.append(_rich(f"{study.title}: {title}", header, rows))
    for title, header, rows in _laws(found):
        made.append(_rich(title, header, rows))
    return made


def markdown(found: Sequence[Study]) -> str:
    """The training runs as Markdown."""
    parts = [f"# What the models learned\n\n{LEGEND}\n"]
    for study in found:
        parts.append(f"## {_escaped(study.title)}\n\n{study.origin}\n")
        for title, header, rows in _of_study(study):
            parts += [f"### {_capitalised(title)}\n", *_lines(header, rows)]
    for title, header, rows in _laws(found):
        parts += [f"## {title}\n", *_lines(header, rows)]
    return "\n".join(parts)


def _rich(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """As text, not markup: a corpus may be a glob with brackets."""
    table = Table(title=Text(title), title_justify="left")
    for name in header:
        wraps = name in WORDY
        shown = name if wraps else name.replace(" ", "\n", 1)
        table.add_column(shown, overflow="fold", no_wrap=not wraps, min_width=9 if wraps else None)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _lines(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    for line in [header, ["---"] * len(header), *rows]:
        yield f"| {' | '.join(_escaped(cell) for cell in line)} |"
    yield ""


def _escaped(text: str) -> str:
    """A name such as mamba2*3+transformer*2 is no emphasis."""
    return " ".join(text.replace("|", "\\|").replace("*", "\\*").split())


def _capitalised(title: str) -> str:
    return title[:1].upper() + title[1:]


def _of_study(study: Study) -> Iterator[Made]:
    """Title, header and rows of a study's tables: the best rates, and all rates."""
    who, columns = _identifying(study), _measured(study)
    what = WHAT[study.kind]
    rows = [[show(p) for show in (*who.values(), *columns.values())] for p in study.points]
    yield f"{what} at the best learning rate", [*who, *columns], rows
    rates = sorted({rate.learning_rate for point in study.points for rate in point.rates})
    if len(rates) < 2:
        return
    rows = [[*(show(p) for show in who.values()), *_of_rates(p, rates)] for p in study.points]
    header = [*who, *(f"rate {rate:g}" for rate in rates)]
    yield f"{what} by learning rate, mean (number of seeds), * the best", header, rows


def _identifying(study: Study) -> Columns:
    """What tells the points of a study apart."""
    columns: Columns = {"architecture": lambda p: NAMES.get(p.arch, p.arch)}
    if study.several_sizes:
        columns["size"] = lambda p: p.size
    for name in study.fields:
        columns[name] = lambda p, name=name: f"{p.block[name]:g}" if name in p.block else "-"
    columns["T"] = lambda p: f"{p.seq_len:,}"
    for name in study.varying:
        columns[name] = lambda p, name=name: str(p.settings.get(name, "-"))
    return columns


def _measured(study: Study) -> Columns:
    """What is known of each point."""
    columns: Columns = {"parameters": lambda p: number(p.mean_of("params"))}
    if study.kind == "loss":
        columns["bits a byte"] = lambda p: _decimals(p.interval.value)
        columns["95 % interval"] = lambda p: _range(p.interval)
        if study.common["unit"] == "character":
            columns["nats a char"] = lambda p: _decimals(p.mean_of("val_loss_nats_per_char"))
    else:
        columns["accuracy"] = lambda p: _decimals(p.interval.value)
        columns["95 % interval"] = lambda p: _range(p.interval)
        if study.chance is None:
            columns["chance"] = lambda p: _decimals(p.mean_of("chance"))
    columns["seeds"] = lambda p: str(len(p.best.values) if p.best else 0)
    columns["best rate"] = _best_rate
    if any(point.unfinished for point in study.points):
        columns["not finished"] = lambda p: p.unfinished or "-"
    if study.kind == "recall":
        columns["steps"] = lambda p: number(p.mean_of("steps_taken"))
        columns["ms a sequence"] = lambda p: number(p.mean_of("forward_time_ms_p50_a_sequence"))
    columns["state, KiB"] = lambda p: number(p.mean_of("state_bytes") / 1024)
    columns["training, s"] = lambda p: number(p.mean_of("train_s"))
    return columns


def _best_rate(point: Point) -> str:
    if point.best is None:
        return "-"
    rate = f"{point.best.learning_rate:g}"
    if len(point.tried) > 1:
        rate += f" of {len(point.tried)}"
    return f"{rate}, {point.edge}" if point.edge else rate


def _of_rates(point: Point, rates: Sequence[float]) -> list[str]:
    """A cell for each rate: the mean and of how many seeds, and what did not finish."""
    own = {rate.learning_rate: rate for rate in point.rates}
    return [_of_rate(own[r], best=own[r] is point.best) if r in own else "" for r in rates]


def _of_rate(rate: Rate, *, best: bool) -> str:
    failed = rate.unfinished
    if not rate.values:
        return failed
    said = f"{rate.mean:.3f} ({len(rate.values)}){' *' if best else ''}"
    return f"{said}, {failed}" if failed else said


def _laws(found: Sequence[Study]) -> Iterator[Made]:
    """Title, header and rows of the tables of laws."""
    fitted = laws(found)
    rows = [_law_row(one) for one in fitted if one.along != "compute"]
    if rows:
        yield "Laws of the validation loss", list(LAW_HEADER), rows
    rows = [row for one in fitted if one.along == "compute" for row in _compute_rows(one)]
    if rows:
        yield "Best size of each compute budget (isoFLOP)", list(COMPUTE_HEADER), rows


def _law_row(one: Fitted) -> list[str]:
    row = [NAMES.get(one.arch, one.arch), one.along, one.held, str(one.points)]
    if isinstance(one.law, LossLaw):
        exponents = _with_interval(one.law.exponent)
        return [*row, _with_interval(one.law.floor), exponents, "; ".join(one.law.flags) or "none"]
    if isinstance(one.law, JointLaw):
        both = (one.law.params_exponent, one.law.tokens_exponent)
        exponents = "; ".join(map(_with_interval, both))
        return [*row, _with_interval(one.law.floor), exponents, "; ".join(one.law.flags) or "none"]
    return [*row, "-", "-", one.reason]


def _compute_rows(one: Fitted) -> Iterator[list[str]]:
    """A row for each budget, then one for the power law of the optima."""
    row = [NAMES.get(one.arch, one.arch), one.held]
    if not isinstance(one.law, IsoFlop):
        yield [*row, "-", "-", one.reason]
        return
    for budget in one.law.budgets:
        best = "-" if budget.params is None else _with_interval(budget.params, count=True)
        yield [*row, f"{budget.compute:.3g}", best, "; ".join(budget.flags) or "none"]
    if one.law.exponent is not None:
        power = f"N grows as C^{_with_interval(one.law.exponent)}"
        yield [*row, "all", power, "none"]
    else:
        yield [*row, "all", "-", one.law.flags[-1]]


def _decimals(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _range(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return "not available" if math.isfinite(interval.value) else "-"
    return f"{interval.low:.3f} to {interval.high:.3f}"


def _with_interval(interval: Interval, *, count: bool = False) -> str:
    """The value, with its interval where there is one; `count`: of a number of parameters."""

    def shown(value: float) -> str:
        return f"{value:,.0f}" if count else f"{value:.2f}"

    if interval.low is None or interval.high is None:
        return shown(interval.value)
    return f"{shown(interval.value)} [{shown(interval.low)}, {shown(interval.high)}]"
