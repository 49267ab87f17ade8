"""Training runs made up for the tests of what reads them."""

import math

from harness.record import Case, Measurement, RunDirectory
from runs import ENVIRONMENT


def loss_run(arch="mamba2", length=64, rate=2e-3, seed=0, loss=2.0, status="ok", **changed):
    """A run that validates at `loss`; options, metrics and fields of the case may be changed."""
    tokens = changed.pop("tokens", 1 << 17)
    metrics = {
        "val_loss_bits_per_byte": loss,
        "val_loss_nats_per_byte": loss * math.log(2),
        "train_s": 10.0 + length / 64,
        "train_flops": 6 * changed.get("metrics", {}).get("params", 300_000) * tokens + length,
        "params": 300_000,
        "state_bytes": 2048,
        "foreign_load": 0.0,
        "bigram_entropy_bits_per_byte": 3.62,
        "corpus_sha256": "0123456789abcdef",
        **changed.pop("metrics", {}),
    }
    places = [2.0**k for k in range(round(math.log2(length)) + 1)]
    looks = range(1, 9)
    samples = {
        "train_loss_bits_per_byte": [8 / (1 + step) + loss for step in range(64)],
        "watched_step": [8.0 * i for i in looks],
        "watched_s": [i * metrics["train_s"] / 8 for i in looks],
        "watched_loss_bits_per_byte": [loss + 8 / i - 1 for i in looks],
        "position": places,
        "position_loss_bits_per_byte": [loss + 1 / place for place in places],
    }
    beyond = changed.pop("evaluate_at", [])
    at = sorted({length, *beyond})
    samples["evaluated_at"] = [float(n) for n in at]
    samples["evaluated_loss_bits_per_byte"] = [loss + 0.01 * n / length for n in at]
    options = {
        "corpus": "python-source",
        "unit": "byte",
        "steps": tokens // 2048,
        "learning_rate": rate,
        "validation_tokens": 65536,
        "validation_block": 2048,
        **({"evaluate_at": beyond} if beyond else {}),
        **changed.pop("options", {}),
    }
    case = {"size": "300K", "batch": 2048 // length, **changed}
    return measurement("loss", arch, length, seed, case, options, status, metrics, samples)


def recall_run(arch="mamba2", length=64, rate=2e-3, seed=0, accuracy=0.5, status="ok", **changed):
    """A run of mqar that answers this share."""
    metrics = {
        "accuracy": accuracy,
        "chance": 1 / 32,
        "queries": 4096,
        "steps_taken": 400,
        "params": 50_000,
        "state_bytes": 4096,
        "forward_time_ms_p50_a_sequence": 0.5,
        "forward_foreign_load": 0.0,
        "train_s": 20.0,
        "train_flops": 10**12,
        **changed.pop("metrics", {}),
    }
    samples = {
        "train_loss_nats": [4 / (1 + step) for step in range(64)],
        "watched_step": [10.0, 20.0],
        "watched_accuracy": [accuracy / 2, accuracy],
    }
    beyond = changed.pop("evaluate_at", [])
    at = sorted({length, *beyond})
    samples["evaluated_at"] = [float(n) for n in at]
    samples["evaluated_accuracy"] = [accuracy * length / n for n in at]
    options = {
        "task": "mqar",
        "settings": {"vocab_size": 64, "pairs": 4, "power": 0.01, **changed.pop("settings", {})},
        "steps": 1000,
        "stop_at": 0.998,
        "learning_rate": rate,
        **({"evaluate_at": beyond} if beyond else {}),
        **changed.pop("options", {}),
    }
    case = {"size": "d64", "batch": 64, **changed}
    return measurement("recall", arch, length, seed, case, options, status, metrics, samples)


def measurement(kind, arch, length, seed, changed, options, status, metrics, samples):
    case = Case(
        kind=kind,
        arch=arch,
        level="model",
        phase="train_step",
        seq_len=length,
        seed=seed,
        options=options,
        **changed,
    )
    ok = status == "ok"
    return Measurement(
        case=case,
        status=status,
        reason=None if ok else "why",
        environment=ENVIRONMENT,
        metrics=metrics if ok else {},
        samples=samples if ok else {},
    )


def write(out, runs):
    """The runs in a run directory."""
    with RunDirectory(out) as directory:
        for run in runs:
            directory.write(run)
    return out
