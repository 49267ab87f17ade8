import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harness import recall, tasks, training
from harness.ranks import Ranks
from harness.trial import Place
from harness.trials import RecallGrid, trial_cells

HERE = Place(ranks=Ranks("cpu"))
RECIPE = training.Recipe(steps=1, learning_rate=1.0)
EASY = RecallGrid(
    tasks="memorisation",
    settings={"vocab_size": 9},
    archs="mamba2",
    lengths=8,
    size="d32h16",
    batch=16,
    steps=120,
    learning_rates=1e-2,
)
SHORT = replace(EASY, steps=4, learning_rates=1e-4)


@pytest.fixture(autouse=True)
def small(request, monkeypatch):
    """Fewer sequences to look at and to test on; a forward pass that takes 8 ms a sequence."""

    def observe(call, *, device):
        assert device == "cpu"
        return {"foreign_load": 0.25}, {"time_ms": [8.0 * len(call())] * 5}

    monkeypatch.setattr(recall, "LOOK_SEQUENCES", 64)
    monkeypatch.setattr(recall, "TEST_SEQUENCES", 128)
    if "really_timed" not in request.fixturenames:
        monkeypatch.setattr(recall.timing, "observe", observe)


@pytest.fixture
def really_timed():
    """Asks for the real clock."""


def measured(grid):
    (case,) = trial_cells([grid])
    return recall.measure(case, HERE)


def drawn(task, seq_len, count=64, **settings):
    return tasks.examples(task, seq_len, count, torch.Generator().manual_seed(0), settings)


# Runs


@pytest.mark.parametrize("arch", ["mamba2", "transformer", "rwkv7"])
def test_an_easy_task_is_solved_and_the_run_ends_there(arch):
    metrics, samples = measured(replace(EASY, archs=arch))
    assert metrics["chance"] == 0.25
    assert metrics["accuracy"] > 0.98
    assert metrics["queries"] == recall.TEST_SEQUENCES * 4
    taken = metrics["steps_taken"]
    assert taken < 120
    assert len(samples["train_loss_nats"]) == taken == samples["watched_step"][-1]
    assert samples["watched_accuracy"][-1] >= 0.998 > max(samples["watched_accuracy"][:-1])
    losses = samples["train_loss_nats"]
    assert metrics["train_loss_nats_last"] == losses[-1] < 0.8 * losses[0]


def test_a_run_that_solves_nothing_takes_all_its_steps():
    metrics, samples = measured(replace(EASY, learning_rates=1e-9, steps=50))
    assert metrics["steps_taken"] == 50
    assert metrics["accuracy"] < 0.6
    assert samples["watched_step"] == sorted({max(1, round(50 * i / 40)) for i in range(1, 41)})


def test_the_blocks_have_the_fields_that_a_grid_gives(monkeypatch):
    made = []

    def build(*args):
        made.append(build_model(*args))
        return made[-1]

    build_model = recall.build_model
    monkeypatch.setattr(recall, "build_model", build)
    given = {"decay_min": 0.5, "decay_max": 0.5}
    for grid in (SHORT, replace(SHORT, block=given)):
        measured(replace(grid, archs="mamba2", learning_rates=1e-9))
    (official, given) = ({float(b.A_log.detach().exp()[0]) for b in m.blocks} for m in made)
    assert all(1 <= decay <= 16 for decay in official)
    assert [*given] == [pytest.approx(0.5)]


def test_the_accuracy_that_ends_a_run_can_be_chosen():
    late, _ = measured(EASY)
    early, samples = measured(replace(EASY, stop_at=0.5))
    assert early["steps_taken"] < late["steps_taken"]
    assert samples["watched_accuracy"][-1] >= 0.5


def test_what_is_recorded_of_a_run(really_timed):
    shares = []
    (case,) = trial_cells([replace(SHORT, evaluate_at=[16, 4])])
    metrics, samples = recall.measure(case, Place(ranks=Ranks("cpu"), on_progress=shares.append))
    assert shares == [0.25, 0.5, 0.75, 1]
    assert metrics["tokens"] == 4 * 16 * 8
    assert samples["evaluated_at"] == [4, 8, 16]
    assert samples["evaluated_accuracy"][1] == metrics["accuracy"]
    assert len(set(samples["evaluated_accuracy"])) > 1
    assert samples["resumed_at_step"] == []
    low, middle, high = (metrics[f"forward_time_ms_p{p}_a_sequence"] for p in (20, 50, 80))
    assert 0 < low <= middle <= high
    model = recall.build_model(case, 9, 16, "cpu")
    assert metrics["train_flops"] == 4 * 3 * model.forward_flops(16, 8)
    assert metrics["params"] == sum(p.numel() for p in model.parameters())
    assert metrics["state_bytes"] == model.state_bytes(1, 8)
    json.dumps([metrics, samples], allow_nan=False)


def test_the_weights_are_part_of_the_peak_memory(monkeypatch):
    order, build, observed = [], recall.build_model, recall.observed
    monkeypatch.setattr(recall, "build_model", lambda *a: order.append("built") or build(*a))
    monkeypatch.setattr(recall, "observed", lambda *a: order.append("observed") or observed(*a))
    measured(SHORT)
    assert order == ["observed", "built"]


def test_the_forward_pass_is_timed_over_the_batch_and_told_for_a_sequence(monkeypatch):
    observe, sizes = recall.timing.observe, []

    def watch(call, **options):
        sizes.append(len(call()))
        return observe(call, **options)

    monkeypatch.setattr(recall.timing, "observe", watch)
    metrics, _ = measured(SHORT)
    assert sizes == [16]
    assert metrics["forward_time_ms_p50_a_sequence"] == 8.0
    assert metrics["forward_foreign_load"] == 0.25


def sequences_of(monkeypatch, grid):
    """Inputs and targets by stream, as a run drew them."""
    found, names = {}, {recall.TRAINING: "training", recall.LOOK: "look", recall.TEST: "test"}
    seeded, examples, last = training.seeded, tasks.examples, []

    def watch_seeds(*numbers):
        last[:] = numbers
        return seeded(*numbers)

    def watch(*args):
        made = examples(*args)
        found.setdefault(names[last[1]], []).append(made)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(training, "seeded", watch_seeds)
        patch.setattr(tasks, "examples", watch)
        measured(grid)
    return found


def rows(examples):
    return {tuple(row) for made in examples for row in made.inputs.tolist()}


MQAR = replace(SHORT, tasks="mqar", settings={"vocab_size": 64, "pairs": 4}, lengths=32)


def test_sequences_of_training_looks_and_test_differ(monkeypatch):
    found = sequences_of(monkeypatch, MQAR)
    assert len(found["training"]) == 4
    assert len(rows(found["training"])) == 4 * 16
    assert len(rows(found["look"])) == recall.LOOK_SEQUENCES
    assert len(rows(found["test"])) == recall.TEST_SEQUENCES
    everything = set.union(*map(rows, found.values()))
    assert len(everything) == 64 + recall.LOOK_SEQUENCES + recall.TEST_SEQUENCES


def test_all_models_of_a_seed_see_the_same_sequences(monkeypatch):
    one, other, another_seed = (
        sequences_of(monkeypatch, replace(MQAR, **fields))
        for fields in ({}, {"archs": "hyena", "size": "d32"}, {"seeds": 1})
    )
    for stream in one:
        for mine, theirs in zip(one[stream], other[stream], strict=True):
            assert torch.equal(mine.inputs, theirs.inputs)
            assert torch.equal(mine.targets, theirs.targets)
        assert not rows(one[stream]) & rows(another_seed[stream])


def test_facts_are_those_of_the_seed_in_training_and_test(monkeypatch):
    def facts(made):
        asked = made.targets >= 0
        keys = made.inputs.roll(1, 1)[asked]
        return set(zip(keys.tolist(), made.targets[asked].tolist(), strict=True))

    found = {}
    for seed in (0, 1):
        streams = sequences_of(monkeypatch, replace(SHORT, seeds=seed))
        told = [facts(made) for made in (*streams["training"], *streams["test"])]
        found[seed] = set.union(*told)
        assert len(found[seed]) == 4  # one value a key
    assert found[0] != found[1]


# Accuracy


class LookUp(nn.Module):
    """Answers MQAR from what it reads: the value that followed the key first."""

    def __init__(self, vocab_size, pairs, shift=0):
        super().__init__()
        self.vocab_size, self.pairs, self.shift = vocab_size, pairs, shift
        self.rows = []

    def forward(self, inputs):
        self.rows.append(len(inputs))
        keys, values = inputs[:, : 2 * self.pairs : 2], inputs[:, 1 : 2 * self.pairs : 2]
        alike = (inputs[:, :, None] == keys[:, None]).double()  # (B, T, pairs)
        answers = (alike @ values.double()[..., None])[..., 0].long()
        answers = (answers + self.shift) % self.vocab_size
        return SimpleNamespace(logits=nn.functional.one_hot(answers, self.vocab_size).float())


@pytest.mark.parametrize("at_once", [1 << 14, 3 * 32, 1])
def test_who_answers_by_look_up_is_always_right(monkeypatch, at_once):
    monkeypatch.setattr(recall, "AT_ONCE", at_once)
    made = drawn("mqar", 32, vocab_size=64, pairs=4)
    model = LookUp(64, 4)
    assert recall.accuracy(model, made, HERE, RECIPE) == 1
    assert max(model.rows) == max(1, min(64, at_once // 32))
    assert sum(model.rows) == 64


def test_who_answers_something_else_is_never_right():
    made = drawn("mqar", 32, vocab_size=64, pairs=4)
    assert recall.accuracy(LookUp(64, 4, shift=1), made, HERE, RECIPE) == 0


def test_accuracy_is_the_share_of_what_is_asked(monkeypatch):
    monkeypatch.setattr(recall, "AT_ONCE", 10)
    inputs = torch.zeros(5, 4, dtype=torch.int64)
    targets = torch.full_like(inputs, -100)
    targets[0], targets[4, 0] = torch.tensor([1, 1, 0, 1]), 0

    class Zero(nn.Module):
        def forward(self, inputs):
            return SimpleNamespace(logits=torch.tensor([1.0, 0.0]).expand(*inputs.shape, 2))

    assert recall.accuracy(Zero(), tasks.Examples(inputs, targets), HERE, RECIPE) == 2 / 5


# Compression


def compressing(arch="mamba2"):
    grid = replace(SHORT, tasks="compression", settings={"vocab_size": 9}, archs=arch)
    (case,) = trial_cells([grid])
    model = recall.build_model(case, 9, 8, "cpu")
    return recall.PositionDecoder(model, 8), drawn("compression", 8, 4, vocab_size=9)


def test_the_decoder_s_gradient_reaches_every_weight():
    decoder, made = compressing()
    training.nats(decoder(made.inputs).logits, made.targets).backward()
    names = {name for name, p in decoder.named_parameters() if p.grad.abs().sum() > 0}
    assert names == {name for name, _ in decoder.named_parameters()}
    assert any(name.startswith("model.blocks.0") for name in names)


@torch.no_grad()
def test_the_decoder_reads_the_last_output_and_the_position_alone(monkeypatch):
    decoder, made = compressing()
    features = decoder.model.features(made.inputs)

    def logits(changed):
        monkeypatch.setattr(decoder.model, "features", lambda tokens: changed)
        return decoder(made.inputs).logits

    right = logits(features)
    assert right.shape == (4, 8, 9)
    noise = torch.randn_like(features)
    noise[:, -1] = 0
    assert torch.equal(logits(features + noise), right)
    noise = torch.zeros_like(features)
    noise[:, -1] = 1
    assert (logits(features + noise) - right).abs().amax((0, 2)).min() > 1e-4  # at every position
    assert (right[:, 1:] - right[:, :-1]).abs().amax((0, 2)).min() > 1e-4


def test_compression_is_trained_through_the_decoder_and_tested_at_other_lengths(monkeypatch):
    built = []

    class Kept(recall.PositionDecoder):
        def __init__(self, *args):
            super().__init__(*args)
            built.append(self)

    monkeypatch.setattr(recall, "PositionDecoder", Kept)
    grid = replace(
        EASY, tasks="compression", settings={"vocab_size": 3}, lengths=4, evaluate_at=[3, 6]
    )
    metrics, samples = measured(grid)
    assert metrics["chance"] == 0.5
    assert metrics["accuracy"] > 0.9
    assert samples["evaluated_at"] == [3, 4, 6]
    assert metrics["queries"] == 3 * recall.TEST_SEQUENCES
    (used,) = built
    assert used.enter.weight.grad.abs().sum() > 0
    assert used.model.embedding.weight.grad.abs().sum() > 0
    width = used.model.embedding.embedding_dim
    step = used.model.forward_flops(grid.batch, 4) + 2 * grid.batch * 4 * 12 * width**2
    assert metrics["train_flops"] == metrics["steps_taken"] * 3 * step


@pytest.mark.parametrize("width", [6, 7])
def test_positions_are_told_by_sines_and_cosines(width):
    found = recall.sinusoids(5, width)
    assert found.shape == (5, width)
    rates = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    half = len(rates)
    for position in range(5):
        assert torch.allclose(found[position, :half], (position * rates).sin())
        assert torch.allclose(found[position, half:], (position * rates).cos()[: width - half])
