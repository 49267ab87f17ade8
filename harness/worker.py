"""The process that measures: started by `harness.run`, asked for one cell after another.

It may die of anything a cell does, so it holds nothing that would be missed. Requests and replies
are JSON lines over two pipes of their own; what cells print goes elsewhere.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from harness.ranks import Ranks
    from harness.record import Case

PR_SET_PDEATHSIG = 1  # prctl.h

OUT_OF_MEMORY = (  # how it looks when it is a plain RuntimeError
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "bad_alloc",
    "out of memory",
)


class WrongResultError(ArithmeticError):
    """An operation's result is not that of its reference, or not possible; the message says how."""


def main() -> None:
    """Answer requests until there are no more."""
    parent, requests, replies = map(int, sys.argv[1:])
    for pipe in (requests, replies):
        os.set_inheritable(pipe, False)
    die_with(parent)
    faulthandler.enable()
    settings: dict[str, Any] = {}
    with os.fdopen(requests, "rb") as asked, os.fdopen(replies, "w", encoding="utf-8") as answer:
        settings["answer"] = answer
        for line in asked:
            request = json.loads(line)
            reply = ANSWERS[request.pop("verb")](settings, **request)
            print(json.dumps(reply, allow_nan=False), file=answer, flush=True)


def die_with(parent: int) -> None:
    """Be killed when the sweep is, and before it when memory runs out."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
        Path("/proc/self/oom_score_adj").write_text("1000")


def _prepare(settings: dict[str, Any], device: str, threads: int | None) -> dict[str, Any]:
    """Set the process up once; reply with the environment it measures in."""
    from harness import timing
    from harness.environment import FINGERPRINT, environment

    settings.update(timing.prepare_process(threads), device=device)
    found = {**environment(device), **timing.prepare_process(threads)}
    settings["place"] = " ".join(str(found.get(name)) for name in FINGERPRINT)
    return found


def _ceilings(settings: dict[str, Any], dtypes: list[str]) -> dict[str, float]:
    from harness import ceilings

    return ceilings.measure(settings["device"], dtypes)


def _measure(
    settings: dict[str, Any],
    case: dict[str, Any],
    ceilings: dict[str, float],
    energy: bool,
    checkpoint: str,
    checkpoint_every_s: float,
) -> dict[str, Any]:
    """Measure one cell; the fields of its record that come from here."""
    from harness import cost
    from harness.record import Case

    asked = Case(**case)
    code = _code_hash(settings, asked)
    start = time.perf_counter()
    plans: dict[str, Any] = {}
    if asked.kind == "cost":
        result = attempt(
            lambda: cost.measure(asked, settings["device"], ceilings, energy=energy, plans=plans)
        )
    else:
        kept = {
            "path": checkpoint,
            "every_s": checkpoint_every_s,
            "written_by": f"{asked.key} {code} {settings['place']}",
        }
        result = _trained(settings, asked, kept, plans)
    seconds = time.perf_counter() - start
    return {**result, "plans": plans, "code_hash": code, "cell_s": seconds}


def _trained(
    settings: dict[str, Any], asked: Case, kept: dict[str, Any], plans: dict[str, Any]
) -> dict[str, Any]:
    """What comes of a training run, here or in processes that share it."""
    from harness import ranks

    device, count = settings["device"], asked.options.get("ranks", 1)
    if count > 1:
        request = {"case": asked.asked(), "kept": kept, "device": device}
        result = attempt(lambda: (ranks.launch(request, count), {}))
        return result["metrics"] if result["status"] == "ok" else result
    return measured(asked, kept, ranks.Ranks(device), plans, _reporter(settings["answer"]))


def _reporter(answer: TextIO) -> Callable[[float], None]:
    """Tells the supervisor the share of a run that is done, once a second at most."""
    said = time.monotonic()

    def report(share: float) -> None:
        nonlocal said
        if time.monotonic() - said >= 1:
            said = time.monotonic()
            print(json.dumps({"progress": share}), file=answer, flush=True)

    return report


def measured(
    case: Case,
    kept: dict[str, Any],
    ranks: Ranks,
    plans: dict[str, Any],
    on_progress: Callable[[float], None],
) -> dict[str, Any]:
    """Status, reason, metrics and samples of a training run in this process.

    Args:
        case: of kind loss or recall.
        kept: fields of `harness.training.Keeping`, the path as a string.
        ranks: this process's place.
        plans: takes what the operations' plans chose.
        on_progress: called with the share of the run that is done.
    """
    from harness import cost, trial
    from harness.plans import recorded
    from harness.training import Keeping

    def run() -> tuple[dict[str, Any], dict[str, Any]]:
        cost.refuse_interpreter(case)
        keeping = Keeping(**{**kept, "path": Path(kept["path"])})
        with recorded(plans):
            return trial.measure(
                case, trial.Place(ranks=ranks, keeping=keeping, on_progress=on_progress)
            )

    return attempt(run)


def _compare(
    settings: dict[str, Any], cases: list[dict[str, Any]], ceilings: dict[str, float]
) -> dict[str, Any]:
    """Measure the cells of a comparison; the fields of their records that come from here.

    An exception is one that spoils the process: it ends here.
    """
    from harness import versus
    from harness.record import Case

    asked = [Case(**case) for case in cases]
    hashes = [_code_hash(settings, case) for case in asked]
    start = time.perf_counter()
    results = versus.measure(asked, settings["device"], ceilings)
    cell_s = (time.perf_counter() - start) / len(asked)
    return {
        "results": [
            {**result, "code_hash": code, "cell_s": cell_s}
            for result, code in zip(results, hashes, strict=True)
        ]
    }


def _code_hash(settings: dict[str, Any], case: Case) -> str:
    """Formed once for what it is of: loaded code stays, whatever the files do."""
    from harness.environment import code_hash

    hashes = settings.setdefault("code_hashes", {})
    what = case.arch, case.implementation, case.backend, case.kind
    return hashes.get(what) or hashes.setdefault(what, code_hash(*what))


def attempt(measure: Callable[[], tuple[dict, dict]]) -> dict[str, Any]:
    """Status, reason, metrics and samples of one attempt, whatever it raises."""
    try:
        metrics, samples = measure()
    except Exception as error:
        return {
            "status": _status(error),
            "reason": one_line(f"{type(error).__name__}: {error}" + _place(error)),
            "detail": "".join(traceback.format_exception(error)),
        }
    return {"status": "ok", "metrics": metrics, "samples": samples}


def _status(error: Exception) -> str:
    from archs.ops import BackendUnavailableError

    # Triton's OutOfResources: this device lacks what the kernel needs.
    if type(error).__name__ == "OutOfResources":
        return "unsupported"
    if isinstance(error, NotImplementedError | BackendUnavailableError):
        return "unsupported"
    if isinstance(error, WrongResultError):
        return "wrong"
    if isinstance(error, FloatingPointError):
        return "diverged"
    if isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY):
        return "oom"
    return "crashed" if type(error).__name__ == "RankDiedError" else "error"


def _place(error: Exception) -> str:
    """Where a bug shows: the last line of code of the traceback."""
    if _status(error) != "error" or not (frames := traceback.extract_tb(error.__traceback__)):
        return ""
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})"


def one_line(text: str, limit: int = 500) -> str:
    """`text` on one line, without characters that a terminal would obey."""
    line = " ".join(text.split())
    return "".join(c for c in line if c.isprintable())[:limit]


Code = dict[str, str | None]  # a file of guards, a tree and another, of which None is none


def _guards(settings: dict[str, Any], code: Code) -> dict[str, Any]:
    """The names of the cells that `seqscale check` guards."""
    from harness import guards

    path, tree, _ = _paths(code)
    return attempt(lambda: ({"names": guards.names(settings["device"], path, tree)}, {}))


def _guard(
    settings: dict[str, Any], name: str, code: Code, *, checked: bool, **how: Any
) -> dict[str, Any]:
    """Time one of them; status "elsewhere" where it was not the code of `tree`, if `checked`."""
    from harness import guard_times, origin

    path, tree, other = _paths(code)
    reply = attempt(
        lambda: guard_times.measure(name, settings["device"], path, tree, checked=checked, **how)
    )
    # All processes of a side import alike, and to look through all modules takes 0.1 s.
    if checked and tree is not None and reply["status"] == "ok":
        try:
            origin.check_origin(path, tree, other)
        except origin.WrongTreeError as error:
            return {"status": "elsewhere", "reason": str(error)}
    return reply


def _paths(code: Code) -> list[Path | None]:
    found = (code[name] for name in ("path", "tree", "other"))
    return [None if path is None else Path(path) for path in found]


ANSWERS: dict[str, Callable[..., dict[str, Any]]] = {
    "prepare": _prepare,
    "ceilings": _ceilings,
    "measure": _measure,
    "compare": _compare,
    "guards": _guards,
    "guard": _guard,
}
