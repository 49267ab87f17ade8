"""What an architecture loses: language models trained on real text, validated by length and place.

Every model of a seed sees the same batches. Validation is on the same tokens at every length that
divides the block (`Corpus.validation_windows`), whole windows, so that a loss at length T is the
mean over all places in a context of T tokens.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from harness import data, training
from harness.corpus import Corpus
from harness.record import Case
from harness.training import Recipe, Trained, nats
from harness.trial import Metrics, Place, Samples, accounted, build_model, observed

LOOKS = 8  # at the validation loss on the way, evenly spread, the end included
LOOKED_AT = 1 << 14  # tokens of such a look, from all over the validation text
AT_ONCE = 1 << 14  # tokens of a forward pass without gradients
BINS_AN_OCTAVE = 4  # of the loss by position

Windows = tuple[Tensor, Tensor]  # inputs and targets, each (windows, T)


def measure(case: Case, place: Place) -> tuple[Metrics, Samples]:
    """Train and validate the model of a case.

    Raises:
        ValueError: the corpus has too little text for the case, or is no corpus.
        FloatingPointError: the run diverged, or its model's loss at a length is no number.
        OSError: a file of the corpus cannot be read, or a checkpoint not written.
    """
    options, length = case.options, case.seq_len or 0
    corpus = data.load(options["corpus"], options["unit"])
    lengths = [length, *options.get("evaluate_at", [])]
    block, tokens = options["validation_block"], options["validation_tokens"]
    data.check(corpus, [length], block, tokens)
    windows = {n: corpus.validation_windows(n, tokens, block) for n in sorted(set(lengths))}
    apart = max(1, len(windows[length][0]) * length // LOOKED_AT)
    inputs, targets = (part[::apart] for part in windows[length])
    steps = options["steps"]
    found: dict[int, Tensor] = {}
    counted: dict[str, int] = {}

    def batch(step: int) -> training.Batch:
        return corpus.batch(case.batch, length, training.seeded(case.seed, step))

    def run() -> Trained:
        model = build_model(case, corpus.vocab_size, max(lengths), place.ranks.device)
        looks = {max(1, round(steps * i / LOOKS)) for i in range(1, LOOKS + 1)}
        recipe = Recipe(
            steps=steps,
            learning_rate=options["learning_rate"],
            bfloat16=case.dtype == "bfloat16",
            watch_at=tuple(sorted(looks)),
        )
        done = training.train(
            model,
            batch,
            recipe,
            ranks=place.ranks,
            watch=lambda: bits(
                by_place(model, (inputs, targets), place, recipe).mean().item(), corpus
            ),
            keeping=place.keeping,
            on_step=lambda step: place.on_progress(step / steps),
        )
        found.update({n: by_place(model, windows[n], place, recipe) for n in windows})
        for n, losses in found.items():
            if not losses.isfinite().all():
                raise FloatingPointError(f"the validation loss is {losses.mean()} at T = {n}")
        counted.update(accounted(model, case))
        return done

    done, seen = observed(run, place)
    trained = done.steps * case.batch * length
    loss = found[length].mean().item()
    metrics: Metrics = {
        "val_loss_bits_per_byte": bits(loss, corpus),
        f"val_loss_nats_per_{_short(corpus.unit)}": loss,
        "train_loss_bits_per_byte_first": bits(done.losses[0], corpus),
        "train_loss_bits_per_byte_last": bits(_last(done.losses), corpus),
        "train_s": done.seconds,
        "tokens": trained,
        "tokens_per_s": trained / done.seconds,
        "train_flops": done.steps * counted.pop("step_flops"),
        **counted,
        **seen,
        **_about(corpus),
    }
    samples: Samples = {
        "train_loss_bits_per_byte": [bits(value, corpus) for value in done.losses],
        "watched_step": [float(look.step) for look in done.watched],
        "watched_s": [look.seconds for look in done.watched],
        "watched_loss_bits_per_byte": [look.value for look in done.watched],
        "resumed_at_step": list(map(float, done.resumed_at)),
        "evaluated_at": list(map(float, windows)),
        "evaluated_loss_bits_per_byte": [bits(found[n].mean().item(), corpus) for n in windows],
    }
    for name, n in (("position", length), ("longest_position", max(lengths))):
        places, losses = binned(found[n])
        samples[name] = places
        samples[f"{name}_loss_bits_per_byte"] = [bits(value, corpus) for value in losses]
    return metrics, samples


@torch.no_grad()
def by_place(model: nn.Module, windows: Windows, place: Place, recipe: Recipe) -> Tensor:
    """The mean loss at each place of a window, (T,) in nats a token, float64, over all windows."""
    inputs, targets = windows
    ranks = place.ranks
    total = torch.zeros(inputs.shape[1], dtype=torch.float64, device=ranks.device)
    rows = max(1, AT_ONCE // inputs.shape[1])
    for start in range(0, len(inputs), rows):
        part, wanted = (x[start : start + rows].to(ranks.device) for x in (inputs, targets))
        with training.autocast(ranks.device_type, recipe.bfloat16):
            logits = model(part).logits
        total += nats(logits, wanted, "none").view(wanted.shape).double().sum(0)
    return (total / len(inputs)).cpu()


def binned(losses: Tensor) -> tuple[list[float], list[float]]:
    """The loss by position in bins that widen: mean position, from 1, and mean loss of each."""
    T = len(losses)
    edges = {round(2 ** (i / BINS_AN_OCTAVE)) for i in range(math.ceil(4 * math.log2(T)) + 1)}
    bounds = [0, *sorted(edge for edge in edges if edge < T), T]
    places, values = [], []
    for low, high in pairwise(bounds):
        places.append((low + 1 + high) / 2)
        values.append(losses[low:high].mean().item())
    return places, values


def bits(nats_a_token: float, corpus: Corpus) -> float:
    """Bits a byte of a loss in nats a token."""
    return nats_a_token / math.log(2) / corpus.bytes_per_token


def _last(losses: list[float]) -> float:
    """The mean of the last twentieth of the steps: one step's loss is noise."""
    few = max(1, len(losses) // 20)
    return sum(losses[-few:]) / few


def _short(unit: str) -> str:
    return "char" if unit == "character" else unit


def _about(corpus: Corpus) -> dict[str, Any]:
    one, pair = data.entropies(corpus.validation, corpus.vocab_size)
    return {
        "unigram_entropy_bits_per_byte": one / corpus.bytes_per_token,
        "bigram_entropy_bits_per_byte": pair / corpus.bytes_per_token,
        "corpus_sha256": corpus.sha256,
        "corpus_documents": corpus.documents,
        "corpus_train_tokens": len(corpus.train),
        "corpus_validation_tokens": len(corpus.validation),
        "vocab_size": corpus.vocab_size,
    }
