"""Grids of training runs: every combination of what they list is a cell; from presets or TOML."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from harness.record import Case
from harness.run import OnFinish, OnStart, Settings, into
from harness.sizes import parse_size, shape_of, width_fields
from harness.sweep import (
    ARCHS,
    DEFAULT_DTYPE,
    check_buildable,
    is_whole,
    listed,
    resolve_device,
    unknown,
)

if TYPE_CHECKING:
    import pandas as pd

UNITS = ("byte", "character")
PARALLEL = ("ddp", "fsdp")
SEVERAL = ("lengths", "evaluate_at", "tokens")  # whole numbers that a grid may list
VALIDATION_TOKENS = 1 << 16
VALIDATION_BLOCK = 2048
SLOW_DECAYS = {"decay_min": 0.05, "decay_max": 1.0}  # Mamba-2's, instead of 1 to 16


@dataclass(frozen=True, kw_only=True)
class Training:
    """What grids of every kind of training run have; a word or number may stand for a list of one.

    Attributes:
        kind: of the cells.
        archs: architectures and hybrids.
        lengths: T of the training sequences.
        size: matched parameters as "1M", or a width as "d64", "d64h16" (heads of 16), "d64n8"
            (Mamba-2's N), "d64l4" (four blocks instead of two).
        learning_rates: the peak of each run.
        seeds: of initial weights and of data, each a run.
        batch: sequences a step, of all ranks together.
        batch_tokens: tokens a step instead: the batch is batch_tokens / length.
        evaluate_at: lengths to evaluate the trained model at too, beyond its own.
        dtype: "float32"; "bfloat16" is autocast, weights stay in float32. auto: bfloat16 on a GPU.
        backend: as in `harness.sweep.Grid`.
        ranks: processes that share a run's batches, each a GPU where there are GPUs.
        parallel: how: "ddp" (weights in each) or "fsdp" (weights cut up among them).
    """

    kind: ClassVar[str]
    archs: str | Sequence[str] = ARCHS
    lengths: int | Sequence[int] = ()
    size: str | Sequence[str] = "1M"
    learning_rates: float | Sequence[float] = 2e-3
    seeds: int | Sequence[int] = 0
    batch: int | None = None
    batch_tokens: int | None = None
    evaluate_at: int | Sequence[int] = ()
    dtype: str = "auto"
    backend: str = "auto"
    ranks: int = 1
    parallel: str = "ddp"

    def cells(self, device: str = "cpu") -> Iterator[Case]:
        """The cells: architectures side by side, seeds last.

        Raises:
            ValueError: something that cannot be; the message says what to write.
        """
        from archs import resolve_backend
        from archs.model import canonical_pattern

        self._check()
        archs = [canonical_pattern(arch) for arch in _names("archs", self.archs)]
        dtype = DEFAULT_DTYPE[device] if self.dtype == "auto" else self.dtype
        for seed, size, length in itertools.product(
            listed(self.seeds), _names("size", self.size), listed(self.lengths)
        ):
            batch = self._batch(length)
            for options, rate, arch in itertools.product(
                self.options(length, batch), listed(self.learning_rates), archs
            ):
                case = Case(
                    kind=self.kind,
                    arch=arch,
                    level="model",
                    phase="train_step",
                    batch=batch,
                    seq_len=length,
                    size=size,
                    dtype=dtype,
                    backend=resolve_backend(self.backend, arch, device),
                    seed=seed,
                    options={**options, "learning_rate": rate, **self._shared_options()},
                )
                check_buildable(case)
                yield case

    def options(self, length: int, batch: int) -> Iterator[dict[str, Any]]:
        """What else tells the cells of a length apart; each kind has its own."""
        raise NotImplementedError

    def _shared_options(self) -> dict[str, Any]:
        shared: dict[str, Any] = {}
        if beyond := sorted(set(listed(self.evaluate_at))):
            shared["evaluate_at"] = beyond
        if self.ranks > 1:
            shared |= {"ranks": self.ranks, "parallel": self.parallel}
        return shared

    def _batch(self, length: int) -> int:
        if self.batch is not None:
            batch = self.batch
        elif self.batch_tokens is None or self.batch_tokens % length:
            raise ValueError(
                f"batch_tokens = {self.batch_tokens} is not a multiple of length {length}: every "
                "length must divide it, or give batch"
            )
        else:
            batch = self.batch_tokens // length
        if batch % self.ranks:
            raise ValueError(f"{self.ranks} ranks cannot share a batch of {batch}: choose another")
        return batch

    def _check(self) -> None:
        """ValueError for what cannot be, whatever the kind."""
        if self.batch is not None and self.batch_tokens is not None:
            raise ValueError("give batch (sequences a step) or batch_tokens, not both")
        if not listed(self.lengths):
            raise ValueError("the grid has no lengths: give lengths = [...]")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(unknown("dtype", self.dtype, ("auto", "float32", "bfloat16")))
        if self.parallel not in PARALLEL:
            raise ValueError(unknown("parallel", self.parallel, PARALLEL))
        numbers = {
            "lengths": self.lengths,
            "evaluate_at": self.evaluate_at,
            "ranks": self.ranks,
            **({} if self.batch is None else {"batch": self.batch}),
            **({} if self.batch_tokens is None else {"batch_tokens": self.batch_tokens}),
            **self.whole_numbers(),
        }
        for name, values in numbers.items():
            several = name in SEVERAL
            for value in listed(values) if several else [values]:
                if not is_whole(value) or not 1 <= value <= 1 << 50:
                    what = "whole numbers" if several else "a whole number"
                    raise ValueError(f"{name} must be {what} >= 1, got {value!r}")
        for seed in listed(self.seeds):
            if not is_whole(seed) or not 0 <= seed < 1 << 31:
                raise ValueError(f"seeds must be whole numbers >= 0, got {seed!r}")
        for rate in listed(self.learning_rates):
            if not _is_number(rate) or not 0 < rate < math.inf:
                raise ValueError(f"learning_rates must be numbers > 0, got {rate!r}")

    def whole_numbers(self) -> dict[str, Any]:
        """Further fields that must be whole numbers from 1 on."""
        return {}


@dataclass(frozen=True, kw_only=True)
class LossGrid(Training):
    """Language models on real text, each trained on the same number of tokens.

    Attributes:
        tokens: that a run trains on in all.
        corpus: as `harness.data.load` names it.
        unit: what a token is: "byte" or "character".
        validation_tokens: tokens that are validated on.
        validation_block: tokens of the pieces that these lie in: a multiple of all lengths, so that
            all are validated on the same tokens. None: 2,048, or the longest length where that is
            no multiple.
    """

    kind: ClassVar[str] = "loss"
    tokens: int | Sequence[int]
    corpus: str = "python-source"
    unit: str = "byte"
    validation_tokens: int = VALIDATION_TOKENS
    validation_block: int | None = None

    def options(self, length: int, batch: int) -> Iterator[dict[str, Any]]:
        """Steps of each token budget, and the corpus."""
        if not isinstance(self.corpus, str):
            raise ValueError(f"corpus must be a name, got {self.corpus!r}")
        if self.unit not in UNITS:
            raise ValueError(unknown("unit", str(self.unit), UNITS))
        lengths = [*listed(self.lengths), *listed(self.evaluate_at)]
        block = self.validation_block or VALIDATION_BLOCK
        if self.validation_block is None and any(block % other for other in lengths):
            block = max(lengths)
        for other in lengths:
            if block % other:
                raise ValueError(
                    f"validation_block = {block} is not a multiple of length {other}: give one "
                    "that is, so that all lengths validate on the same tokens"
                )
        for tokens in listed(self.tokens):
            if tokens < batch * length:
                raise ValueError(f"tokens = {tokens} is less than a step of {batch} x {length}")
            yield {
                "steps": tokens // (batch * length),
                "corpus": self.corpus,
                "unit": self.unit,
                "validation_tokens": self.validation_tokens,
                "validation_block": block,
            }

    def whole_numbers(self) -> dict[str, Any]:
        """Those of the token budget and the validation."""
        return {
            "tokens": self.tokens,
            "validation_tokens": self.validation_tokens,
            **(
                {} if self.validation_block is None else {"validation_block": self.validation_block}
            ),
        }


@dataclass(frozen=True, kw_only=True)
class RecallGrid(Training):
    """Models on synthetic tasks, until they are solved or the steps are done.

    Attributes:
        tasks: names of `harness.tasks`.
        settings: of the task; lists make more cells. Those left out are the paper's.
        steps: at most.
        stop_at: accuracy at which a run counts as solved, and ends.
        block: further fields of the blocks' `Config`, as {"decay_max": 1.0}; all archs have them.
    """

    kind: ClassVar[str] = "recall"
    tasks: str | Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int
    stop_at: float = 0.998
    block: Mapping[str, Any] = field(default_factory=dict)

    def cells(self, device: str = "cpu") -> Iterator[Case]:
        """As `Training.cells`; a matched size must be one that has the task's vocabulary too."""
        from harness import tasks

        for case in super().cells(device):
            _check_block(case)
            vocab_size = tasks.vocab_size(case.options["task"], case.options["settings"])
            shape_of(case.arch, case.size, vocab_size, self.block)
            yield case

    def options(self, length: int, batch: int) -> Iterator[dict[str, Any]]:
        """Every task with every combination of settings."""
        from harness import tasks

        if not isinstance(self.settings, Mapping):
            raise ValueError(f"settings must be a table, got {self.settings!r}")
        if not isinstance(self.block, Mapping):
            raise ValueError(f"block must be a table, got {self.block!r}")
        if not _is_number(self.stop_at) or not 0 < self.stop_at <= 1:
            raise ValueError(f"stop_at must be an accuracy of at most 1, got {self.stop_at!r}")
        for task in _names("tasks", self.tasks):
            for values in itertools.product(*map(listed, self.settings.values())):
                settings = dict(zip(self.settings, values, strict=True))
                for other in listed(self.evaluate_at):
                    tasks.checked(task, other, settings)
                yield {
                    "task": task,
                    "settings": tasks.checked(task, length, settings),
                    "steps": self.steps,
                    "stop_at": self.stop_at,
                    **({"block": dict(self.block)} if self.block else {}),
                }

    def whole_numbers(self) -> dict[str, Any]:
        """The steps."""
        return {"steps": self.steps}


LOSS_PRESETS: dict[str, tuple[LossGrid, ...]] = {
    # Under a minute on two cores: the curves of four short runs.
    "demo": (LossGrid(lengths=256, size="300K", batch_tokens=2048, tokens=1 << 17),),
    # Nine minutes on two cores.
    "quick": (
        LossGrid(
            lengths=(64, 256, 1024),
            size="300K",
            batch_tokens=2048,
            tokens=400 * 2048,
            learning_rates=3e-3,
        ),
    ),
    # The character-level recipe of nanoGPT for a CPU, our Transformer in its place; the others at
    # its 1,066,368 parameters. Takes --corpus files:PATH, tiny Shakespeare.
    "nanogpt": tuple(
        LossGrid(
            archs=archs,
            lengths=64,
            size=size,
            batch=12,
            tokens=2000 * 12 * 64,
            corpus="files:tinyshakespeare.txt",
            unit="character",
            validation_tokens=1 << 30,  # all of them
            validation_block=64,
        )
        for archs, size in ((ARCHS[:1], "d128h32l4"), (ARCHS[1:], "1066K"))
    ),
    # Three hours on one core: lengths enough for a law, rates beyond the best ones, three seeds.
    "cpu": (
        LossGrid(
            lengths=(64, 128, 256, 512, 1024),
            size="300K",
            batch_tokens=2048,
            tokens=300 * 2048,
            learning_rates=(7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2),
            seeds=(0, 1, 2),
        ),
    ),
    # A part is a length, to be asked for with --length; none has run on a GPU yet.
    "h100": tuple(
        LossGrid(
            lengths=length,
            size=size,
            batch_tokens=1 << 16,
            tokens=1 << 27,
            learning_rates=1e-3,
            evaluate_at=16384,
            validation_tokens=1 << 20,
            validation_block=16384,
        )
        for size in ("10M", "30M")
        for length in (512, 1024, 2048, 4096, 8192, 16384)
    ),
}
RECALL_PRESETS: dict[str, tuple[RecallGrid, ...]] = {
    # Fourteen minutes on one core: a smoke run. Too small to rank anything: with eight pairs it
    # ends before attention finds the keys, which in "cpu" it does.
    "quick": tuple(
        RecallGrid(
            archs=archs,
            tasks="mqar",
            settings={"vocab_size": 64, "pairs": pairs},
            lengths=length,
            size=size,
            block=block,
            batch=batch,
            steps=1000,
            learning_rates=(1e-3, 5e-3),
        )
        for length, pairs, batch in ((64, 4, 16), (128, 8, 8))
        for archs, size, block in (
            (("transformer", "rwkv7", "hyena"), "d64", {}),
            ("mamba2", "d64h16n64", SLOW_DECAYS),
        )
    ),
    # An hour and a half on one core: pairs, at three sizes of state where it can be chosen. Mamba-2
    # starts with slow decays, and at its largest state also with its own: they are made for text,
    # and find the keys later.
    "cpu": tuple(
        RecallGrid(
            archs=archs,
            tasks="mqar",
            settings={"vocab_size": 64, "pairs": [2, 4, 8]},
            lengths=64,
            size=size,
            block=block,
            batch=8,
            steps=4000,
            learning_rates=(1e-3, 5e-3),
        )
        for archs, size, block in (
            (("transformer", "hyena"), "d64", {}),
            ("rwkv7", ("d64h16", "d64h32", "d64"), {}),
            ("mamba2", ("d64h16n8", "d64h16n32", "d64h16n128"), SLOW_DECAYS),
            ("mamba2", "d64h16n128", {}),
        )
    ),
    # The configurations of Zoology (arXiv 2312.04927, figure 2): pairs grow with the length.
    "mqar": tuple(
        RecallGrid(
            tasks="mqar",
            settings={"vocab_size": 8192, "pairs": pairs},
            lengths=length,
            size=("d64", "d128", "d256", "d512"),
            batch=batch,
            steps=20_000,
            stop_at=0.99,
            learning_rates=(1e-4, 4.6e-4, 2.2e-3, 1e-2),
        )
        for length, pairs, batch in ((64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128))
    ),
    # The tasks of MAD (arXiv 2403.17844, table B.1) at its lengths.
    "mad": tuple(
        RecallGrid(
            tasks=tasks,
            lengths=length,
            size="d128",
            batch=128,
            steps=20_000,
            learning_rates=(1e-4, 5e-4, 1e-3),
        )
        for tasks, length in (
            (("in-context-recall", "fuzzy-recall", "noisy-recall"), 128),
            ("selective-copying", 256),
            (("compression", "memorisation"), 32),
        )
    ),
    # Mamba's induction heads (arXiv 2312.00752, section 4.1.2), and parity (2411.12537): trained at
    # one length, tested beyond.
    "extrapolation": tuple(
        RecallGrid(
            tasks=task,
            lengths=length,
            evaluate_at=beyond,
            size="d64",
            batch=8 if length == 256 else 64,
            steps=20_000,
            learning_rates=(1e-4, 1e-3),
        )
        for task, length, beyond in (
            ("induction-heads", 256, (64, 1024, 4096)),
            ("parity", 40, (80, 160, 256)),
        )
    ),
}
PRESETS: dict[str, Mapping[str, tuple[Training, ...]]] = {
    "loss": LOSS_PRESETS,
    "recall": RECALL_PRESETS,
}


def trial_cells(grids: Iterable[Training], device: str = "cpu") -> list[Case]:
    """All cells of the grids, each once, in order.

    Raises:
        ValueError: as `Training.cells`, or there is none.
    """
    found = {case.key: case for grid in grids for case in grid.cells(device)}
    if not found:
        raise ValueError("the sweep has no cells")
    return list(found.values())


def narrowed(
    grids: Iterable[Training], *, archs: Sequence[str] | None = None, **instead: Any
) -> list[Training]:
    """The grids with some architectures only, and with other fields for theirs.

    An architecture that no grid has is added to all but those whose size gives heads or states, or
    that give fields of blocks.

    Args:
        grids: of a preset or a file.
        archs: only these; all where there are none.
        **instead: fields to replace where they are not None.

    Raises:
        ValueError: no such architecture, or no grid is left.
    """
    from archs import block_class
    from archs.model import expand_pattern

    for name in (name for arch in archs or () for name in expand_pattern(arch)):
        block_class(name)
    changes = {name: value for name, value in instead.items() if value is not None}
    if "batch" in changes:
        changes["batch_tokens"] = None
    if "batch_tokens" in changes and changes["batch_tokens"] is not None:
        changes["batch"] = None
    grids = [replace(grid, **changes) for grid in grids]
    if not archs:
        return grids
    known = {arch for grid in grids for arch in listed(grid.archs)}
    found = []
    for grid in grids:
        kept = [arch for arch in listed(grid.archs) if arch in archs]
        if not _of_its_archs_alone(grid):
            kept += [arch for arch in archs if arch not in known]
        if kept:
            found.append(replace(grid, archs=kept))
    if not found:
        raise ValueError("the sweep has no such architecture at its sizes: give a size too")
    return found


def _of_its_archs_alone(grid: Training) -> bool:
    with_fields = any(width_fields(str(size)) for size in listed(grid.size))
    return with_fields or (isinstance(grid, RecallGrid) and bool(grid.block))


def preset(kind: type[Training], name: str) -> tuple[Training, ...]:
    """The grids of a preset; ValueError with the nearest name if there is none."""
    if name not in PRESETS[kind.kind]:
        raise ValueError(unknown("preset", name, PRESETS[kind.kind]))
    return PRESETS[kind.kind][name]


def check_corpora(cells: Iterable[Case]) -> None:
    """Read every corpus of some cells: whether it is there, long enough, and fits into the sizes.

    Raises:
        ValueError, OSError: as `harness.data.load`, `harness.data.check` and
            `harness.sizes.shape_of`.
    """
    from harness import data

    for case in cells:
        if case.kind == "loss":
            corpus = data.load(case.options["corpus"], case.options["unit"])
            block, tokens = case.options["validation_block"], case.options["validation_tokens"]
            data.check(corpus, [case.seq_len or 0], block, tokens)
            shape_of(case.arch, case.size, corpus.vocab_size)


def run(
    sweep: Sequence[Training] | Sequence[Case],
    out: Path | str,
    *,
    device: str = "auto",
    threads: int | None = None,
    time_limit_s: float = 3600.0,
    checkpoint_every_s: float = 60.0,
    on_start: OnStart = lambda case: None,
    on_finish: OnFinish = lambda measurement, known: None,
    **reporting: Any,
) -> pd.DataFrame:
    """Train every cell that `out` does not hold yet; one row a cell, all cells of `out`.

    Args:
        sweep: grids, as of `preset` or `harness.sweep.load`, or cells of `trial_cells`.
        out: run directory; records go to `out`/records, the table to `out`/cells.csv, checkpoints
            of runs that did not end to `out`/checkpoints.
        device: "cpu", "cuda", or "auto": an NVIDIA GPU where there is one.
        threads: CPU threads for PyTorch; default: as it is, and 1 where all cells are of recall,
            whose models a second thread slows down.
        time_limit_s: for one cell; one that takes longer is recorded as "timeout", and goes on from
            its checkpoint under a longer limit.
        checkpoint_every_s: seconds between checkpoints.
        on_start: called before each cell that is trained.
        on_finish: called for each cell with its measurement, and whether it was there before.
        **reporting: on_open and on_progress, as `harness.run.into`.

    Raises:
        ValueError: something in the sweep does not exist, a number cannot be, or a corpus is not
            what it should be.
        OSError, DirectoryInUseError, WorkerFailedError: as `harness.cost.run`.
    """
    device = resolve_device(device)
    cells: list[Case] = []
    for part in sweep:
        cells += [part] if isinstance(part, Case) else trial_cells([part], device)
    check_corpora(cells)
    if threads is None and all(case.kind == "recall" for case in cells):
        threads = 1
    settings = Settings(device, threads, time_limit_s, checkpoint_every_s=checkpoint_every_s)
    reporting |= {"on_start": on_start, "on_finish": on_finish}
    return into(Path(out), cells, settings, **reporting)


def _check_block(case: Case) -> None:
    """ValueError for fields that are not of the architecture's `Config`, or cannot be."""
    from archs import block_class
    from archs.model import expand_pattern

    given = case.options.get("block", {})
    if not given:
        return
    kinds = set(expand_pattern(case.arch))
    if len(kinds) > 1:
        raise ValueError("a hybrid has blocks of several kinds: give block to one architecture")
    config = block_class(kinds.pop()).Config
    # What the size says already.
    sized = {"width", "max_len", *width_fields(case.size)}
    if parse_size(case.size)[0] == "params":
        sized |= {"mlp_width"}
    known = sorted({field.name for field in fields(config)} - sized)
    for name, value in given.items():
        if name not in known:
            raise ValueError(unknown(f"field of {case.arch} at size {case.size}", name, known))
        if not isinstance(value, int | float):
            raise ValueError(f"block: {name} must be a number, or true or false, got {value!r}")
    shape = shape_of(case.arch, case.size, fields=given)
    try:
        config(width=shape.width, **shape.fields)
    except ValueError as error:
        raise ValueError(f"{case.arch} at size {case.size}: {error}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names(name: str, value: Any) -> list[str]:
    values = listed(value)
    if not values or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{name} must be a name or a list of names, got {values!r}")
    return values
