"""What an architecture can look up: models trained on synthetic tasks, and how often right.

Sequences are drawn anew for every step, alike for every model of a seed, those of the test from
another stream. A run ends when the task is solved on a third, or its steps are done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from archs import LanguageModel
from archs.block import train_flops
from archs.model import ModelOutput
from harness import tasks, timing, training
from harness.record import Case
from harness.tasks import Examples
from harness.training import Recipe, Trained
from harness.trial import Metrics, Place, Samples, accounted, build_model, observed

LOOKS = 40  # at the accuracy on the way, at most: where a run may end
LOOK_SEQUENCES, TEST_SEQUENCES = 256, 1024
TRAINING, LOOK, TEST = 0, 1, 2  # streams of sequences
AT_ONCE = 1 << 14  # tokens of a forward pass without gradients


def measure(case: Case, place: Place) -> tuple[Metrics, Samples]:
    """Train the model of a case on its task, test it, and time its forward pass.

    Raises:
        FloatingPointError: the run diverged.
        OSError: a checkpoint cannot be written.
    """
    options, length, ranks = case.options, case.seq_len or 0, place.ranks
    lengths = sorted({length, *options.get("evaluate_at", [])})
    steps = options["steps"]
    recipe = Recipe(
        steps=steps,
        learning_rate=options["learning_rate"],
        bfloat16=case.dtype == "bfloat16",
        watch_at=tuple(sorted({max(1, round(steps * i / LOOKS)) for i in range(1, LOOKS + 1)})),
        stop_at=options["stop_at"],
    )

    def drawn(stream: int, number: int, count: int, n: int = length) -> Examples:
        generator = training.seeded(case.seed, stream, number)
        settings = options["settings"]
        return tasks.examples(options["task"], n, count, generator, settings, case.seed)

    look = drawn(LOOK, 0, LOOK_SEQUENCES)
    made: list[tuple[LanguageModel, nn.Module]] = []

    def run() -> Trained:
        vocab_size = tasks.vocab_size(options["task"], options["settings"])
        model = build_model(case, vocab_size, max(lengths), ranks.device)
        answering = _answering(model, options, max(lengths), ranks.device)
        made.append((model, answering))
        return training.train(
            answering,
            lambda step: drawn(TRAINING, step, case.batch),
            recipe,
            ranks=ranks,
            watch=lambda: accuracy(answering, look, place, recipe),
            keeping=place.keeping,
            on_step=lambda step: place.on_progress(step / steps),
        )

    done, seen = observed(run, place)
    ((model, answering),) = made
    right = [accuracy(answering, drawn(TEST, 0, TEST_SEQUENCES, n), place, recipe) for n in lengths]
    counted = accounted(model, case)
    if isinstance(answering, PositionDecoder):
        counted["step_flops"] += train_flops(answering.flops(case.batch * length))
    metrics: Metrics = {
        "accuracy": right[lengths.index(length)],
        "chance": tasks.chance(options["task"], options["settings"]),
        "queries": int(drawn(TEST, 0, TEST_SEQUENCES).targets.ge(0).sum()),
        "steps_taken": done.steps,
        "train_loss_nats_last": done.losses[-1],
        "train_s": done.seconds,
        "tokens": done.steps * case.batch * length,
        "train_flops": done.steps * counted.pop("step_flops"),
        **counted,
        **seen,
        **_timed(answering, look, case, place, recipe),
    }
    samples: Samples = {
        "train_loss_nats": done.losses,
        "watched_step": [float(seen.step) for seen in done.watched],
        "watched_accuracy": [seen.value for seen in done.watched],
        "resumed_at_step": list(map(float, done.resumed_at)),
        "evaluated_at": list(map(float, lengths)),
        "evaluated_accuracy": right,
    }
    return metrics, samples


class PositionDecoder(nn.Module):
    """Tells each token of a sequence from the model's output at its last position.

    As MAD's compression task (arXiv 2403.17844, appendix B): an MLP of two layers, of which the
    second is the model's head, reads that output beside an embedding of the position asked for.
    """

    def __init__(self, model: LanguageModel, max_len: int) -> None:
        super().__init__()
        width = model.embedding.embedding_dim
        self.model = model
        self.places: Tensor
        self.register_buffer("places", sinusoids(max_len, width), persistent=False)
        self.enter = nn.Linear(2 * width, 4 * width)
        self.leave = nn.Linear(4 * width, width)

    def flops(self, tokens: int) -> int:
        """Forward FLOPs of the layers of its own, for every token asked for."""
        own = (self.enter, self.leave)
        return 2 * tokens * sum(layer.in_features * layer.out_features for layer in own)

    def forward(self, tokens: Tensor) -> ModelOutput:
        """`logits` (B, T, V) of every token of `tokens` (B, T)."""
        last = self.model.features(tokens)[:, -1:].expand(-1, tokens.shape[1], -1)  # (B, T, D)
        places = self.places[: tokens.shape[1]].to(last.dtype).expand_as(last)
        hidden = nn.functional.gelu(self.enter(torch.cat([last, places], -1)))
        return ModelOutput(self.model.head(self.leave(hidden)))


def sinusoids(length: int, width: int) -> Tensor:
    """Position embeddings (length, width) of Vaswani et al., arXiv 1706.03762, section 3.5."""
    rates = 10_000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(length), rates)
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples, place: Place, recipe: Recipe) -> float:
    """The share of what is asked that the model's likeliest token answers."""
    right, asked = 0, 0
    rows = max(1, AT_ONCE // examples.inputs.shape[1])
    for start in range(0, len(examples.inputs), rows):
        inputs, targets = (x[start : start + rows].to(place.ranks.device) for x in examples)
        with training.autocast(place.ranks.device_type, recipe.bfloat16):
            answers = model(inputs).logits.argmax(-1)
        known = targets >= 0
        right += int((answers == targets)[known].sum())
        asked += int(known.sum())
    return right / asked


def _answering(
    model: LanguageModel, options: Mapping[str, Any], max_len: int, device: str
) -> nn.Module:
    """The module whose logits answer the task: the model, or a decoder around it."""
    if tasks.TASKS[options["task"]].decoder == "position-mlp":
        return PositionDecoder(model, max_len).to(device)
    return model


def _timed(
    model: nn.Module, examples: Examples, case: Case, place: Place, recipe: Recipe
) -> dict[str, Any]:
    """Time of the trained model's forward pass over a batch, a sequence."""
    if place.ranks.count > 1:
        return {}
    inputs = examples.inputs[: case.batch].to(place.ranks.device)

    @torch.no_grad()
    def forward() -> Tensor:
        with training.autocast(place.ranks.device_type, recipe.bfloat16):
            return model(inputs).logits

    metrics, samples = timing.observe(forward, device=place.ranks.device_type)
    a_sequence = timing.quantiles([ms / len(inputs) for ms in samples["time_ms"]])
    found = {f"forward_{name}_a_sequence": ms for name, ms in a_sequence.items()}
    return {**found, "forward_foreign_load": metrics["foreign_load"]}
