import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import archs
from archs.model import expand_pattern
from harness import checkpoint, training
from harness.ranks import Ranks
from harness.training import Keeping, Recipe, train

HEADS = ("transformer", "mamba2", "rwkv7")
ARCHS = (*HEADS, "hyena", "rwkv7+mamba2+transformer")
HERE = Ranks("cpu")
V, B, T = 16, 4, 16


def model_of(arch, seed=0):
    torch.manual_seed(seed)
    return archs.build_model(
        arch,
        width=32,
        depth=max(2, len(expand_pattern(arch))),
        vocab_size=V,
        max_len=T,
        backend="torch",
        options={name: {"head_dim": 16} for name in HEADS if name in expand_pattern(arch)},
    )


def batches(seed=0):
    """Sequences that count up, or by twos, from anywhere."""

    def batch(step):
        draws = training.seeded(seed, step)
        start, stride = (torch.randint(n, (B, 1), generator=draws) for n in (V, 2))
        tokens = (start + (1 + stride) * torch.arange(T + 1)) % V
        return tokens[:, :-1], tokens[:, 1:]

    return batch


def recipe(steps=12, **fields):
    return Recipe(**{"steps": steps, "learning_rate": 1e-2, **fields})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(some, others):
    assert some.keys() == others.keys()
    return all(torch.equal(some[name], others[name]) for name in some)


class Scripted(nn.Module):
    """Logits of two tokens that depend on a weight and on how often it was called."""

    def __init__(self, logit):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.logit = logit
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        right = (self.logit(self.calls) * self.weight).expand(inputs.shape)
        return SimpleNamespace(logits=torch.stack([right, torch.zeros_like(right)], -1))


def zeros(step):
    return (torch.zeros(B, T, dtype=torch.int64),) * 2


# The recipe


def test_the_rate_warms_up_and_falls_along_a_cosine_to_a_tenth():
    plan = Recipe(steps=100, learning_rate=2.0)
    rates = [training.rate(step, plan) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.1)  # halfway between the peak and its tenth
    assert rates[32] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * 22 / 90)) / 2)
    assert 0.2 < rates[99] < 0.201
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert training.rate(100, plan) == pytest.approx(0.2)


def test_a_single_step_has_the_peak_rate():
    assert training.rate(0, Recipe(steps=1, learning_rate=3.0)) == 3.0


class Weights(nn.Module):
    """Parameters of every kind that decay knows, none of which matters to the loss."""

    def __init__(self):
        super().__init__()
        self.matrix, self.spared = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
        self.vector, self.scalar = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(()))
        self.spared._no_weight_decay = True

    def forward(self, inputs):
        nothing = 0 * sum(p.sum() for p in self.parameters())
        return SimpleNamespace(logits=nothing.expand(*inputs.shape, 2))


def test_decay_acts_on_matrices_that_are_not_spared_and_on_nothing_else():
    model, plan = Weights(), recipe(20, learning_rate=0.5)
    train(model, zeros, plan, ranks=HERE)
    left = math.prod(1 - 0.1 * training.rate(step, plan) for step in range(20))
    assert left < 0.7
    assert torch.allclose(model.matrix, torch.tensor(left))
    for other in (model.spared, model.vector, model.scalar):
        assert torch.equal(other, torch.ones_like(other))


@pytest.mark.parametrize(("logit", "norm"), [(-1e3, 1.0), (-1e-3, None)])
def test_gradients_are_clipped_to_norm_one_and_never_lengthened(logit, norm):
    model = Scripted(lambda call: logit)
    train(model, zeros, recipe(1), ranks=HERE)
    # Of -log sigmoid(logit * weight) at weight 1.
    whole = abs(logit) / (1 + math.exp(max(logit, -50)))
    assert model.weight.grad.abs().item() == pytest.approx(norm or whole, rel=1e-4)


def test_training_is_what_a_loop_written_out_does():
    def batch(step):
        inputs, targets = batches()(step)
        return inputs, torch.where(inputs % 3 == 0, -100, targets)  # not asked for

    model, plan = model_of("transformer"), recipe(6)
    run = train(model, batch, plan, ranks=HERE)

    other = model_of("transformer")
    matrices = [p for p in other.parameters() if p.ndim > 1]
    vectors = [p for p in other.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}],
        betas=(0.9, 0.95),
    )
    losses = []
    for step in range(6):
        inputs, targets = batch(step)
        chosen = other(inputs).logits.log_softmax(-1)[targets >= 0]  # (asked for, V)
        loss = -chosen.gather(1, targets[targets >= 0][:, None]).mean()
        optimiser.zero_grad()
        loss.backward()
        squares = sum(p.grad.square().sum() for p in other.parameters()).item()
        for p in other.parameters():
            p.grad /= max(1.0, math.sqrt(squares))
        for group in optimiser.param_groups:
            group["lr"] = training.rate(step, plan)
        optimiser.step()
        losses.append(loss.item())
    assert run.losses == pytest.approx(losses, abs=1e-5)
    found = weights(model)
    for name, weight in other.named_parameters():
        assert torch.allclose(found[name], weight, atol=1e-3), name


@pytest.mark.parametrize("arch", ARCHS)
def test_the_loss_falls(arch):
    losses = train(model_of(arch), batches(), recipe(60), ranks=HERE).losses
    assert losses[0] == pytest.approx(math.log(V), rel=0.15)
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_the_same_seed_gives_the_same_run_and_another_another():
    def losses(weights_seed, data_seed):
        model = model_of("mamba2", weights_seed)
        return train(model, batches(data_seed), recipe(5), ranks=HERE).losses

    assert losses(0, 0) == losses(0, 0)
    assert losses(0, 0) != losses(1, 0)
    assert losses(0, 0) != losses(0, 1)


def test_generators_differ_by_every_number_and_their_order():
    numbers = [(0, 0), (0, 1), (1, 0), (1, 1), (7, 1 << 31), (1 << 31, 7), (2, 1, 0), (2, 0, 1)]
    draws = {tuple(torch.rand(4, generator=training.seeded(*n)).tolist()) for n in numbers}
    assert len(draws) == len(numbers)
    again = torch.rand(4, generator=training.seeded(7, 1 << 31)).tolist()
    assert tuple(again) in draws


@pytest.mark.parametrize("arch", ARCHS)
def test_bfloat16_follows_float32_with_weights_in_float32(arch):
    plan = recipe(20, learning_rate=3e-3)
    exact = train(model_of(arch), batches(), plan, ranks=HERE).losses
    model = model_of(arch)
    seen = set()
    model.head.register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    plan = recipe(20, learning_rate=3e-3, bfloat16=True)
    rounded = train(model, batches(), plan, ranks=HERE).losses
    assert seen == {torch.bfloat16}
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.03)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# Looking at the model


def test_it_is_watched_after_the_steps_asked_for():
    model, after = model_of("hyena"), []

    def value():
        return model.head.weight.sum().item()

    plan = recipe(watch_at=(1, 5, 12))
    run = train(
        model, batches(), plan, ranks=HERE, watch=value, on_step=lambda step: after.append(value())
    )
    assert [look.step for look in run.watched] == [1, 5, 12]
    assert [look.value for look in run.watched] == [after[0], after[4], after[11]]
    times = [look.seconds for look in run.watched]
    assert 0 < times[0] < times[1] < times[2] == run.seconds


def test_seconds_of_training_leave_out_what_lies_between_steps(monkeypatch):
    now = 0.0

    def passing(result, seconds):
        nonlocal now
        now += seconds
        return result

    monkeypatch.setattr(training.time, "perf_counter", lambda: now)
    run = train(
        Scripted(lambda call: 1.0),
        lambda step: passing(zeros(step), 1.0),
        recipe(3, watch_at=(1, 2)),
        ranks=HERE,
        watch=lambda: passing(0.0, 100.0),
        on_step=lambda step: passing(None, 10_000.0),
    )
    assert run.seconds == 3
    assert [look.seconds for look in run.watched] == [1, 2]


def test_a_run_ends_where_it_is_solved():
    values = iter([0.2, 0.9, 0.8, 0.95, 1.0])
    plan = recipe(watch_at=(2, 4, 6, 8, 10), stop_at=0.95)
    steps = []
    run = train(
        Scripted(lambda call: 1.0),
        zeros,
        plan,
        ranks=HERE,
        watch=lambda: next(values),
        on_step=steps.append,
    )
    assert run.steps == 8
    assert steps == list(range(1, 9))
    assert run.watched[-1].value == 0.95


# Divergence


def diverging(logit, steps=60, **watching):
    with pytest.raises(FloatingPointError) as error:
        train(Scripted(logit), zeros, recipe(steps, learning_rate=1e-9), ranks=HERE, **watching)
    return str(error.value)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step(loss):
    assert diverging(lambda call: -loss if call == 4 else 1.0) == f"the loss is {loss} at step 4"


def test_a_loss_that_blows_up_ends_the_run_and_names_the_step():
    # From log 2 = 0.693 to 2.13 nats, for good: 20 steps in the mean exceed 1.5 times the first
    # loss when five of them are high.
    said = diverging(lambda call: 0.0 if call <= 30 else -2.0)
    assert said == "the loss grew from 0.693 to 1.05 nats by step 35"


def test_a_spike_is_no_divergence():
    run = train(
        Scripted(lambda call: -6.0 if call == 30 else 0.0),
        zeros,
        recipe(60, learning_rate=1e-9),
        ranks=HERE,
    )
    assert run.steps == 60
    assert max(run.losses) > 6


def test_a_watched_value_that_is_no_number_ends_the_run(tmp_path):
    plan = recipe(3, watch_at=(2,))
    with pytest.raises(FloatingPointError, match=r"^nan was seen after step 2$"):
        train(
            Scripted(lambda call: 1.0),
            zeros,
            plan,
            ranks=HERE,
            watch=lambda: math.nan,
            keeping=Keeping(path=tmp_path / "run", every_s=0, written_by="me"),
        )


# Resume


class Interrupted(Exception):  # noqa: N818 (no error)
    """Stands for the end of a process."""


def run_of(arch, path, *, every_s=0.0, stop_after=None, written_by="me"):
    """A run that is kept, and its weights; or what one leaves that ends after some steps."""

    def on_step(step):
        if step == stop_after:
            raise Interrupted

    model = model_of(arch)
    run = train(
        model,
        batches(),
        recipe(watch_at=(2, 6, 9, 12)),
        ranks=HERE,
        watch=lambda: model(batches(1)(0)[0]).logits.sum().item(),
        keeping=Keeping(path=path, every_s=every_s, written_by=written_by),
        on_step=on_step,
    )
    return run, weights(model)


def interrupted(arch, path, after, **options):
    with pytest.raises(Interrupted):
        run_of(arch, path, stop_after=after, **options)


def told(run):
    """What is recorded of a run, its times left out."""
    return run.losses, [(look.step, look.value) for look in run.watched]


@pytest.mark.parametrize(("arch", "after"), [*zip(ARCHS, (1, 5, 6, 7, 11), strict=True)])
def test_a_run_goes_on_from_its_checkpoint_to_the_last_bit(tmp_path, arch, after):
    whole, final = run_of(arch, tmp_path / "whole")
    interrupted(arch, tmp_path / "run", after)
    run, ended = run_of(arch, tmp_path / "run")
    assert told(run) == told(whole)
    assert same(ended, final)
    assert run.resumed_at == [after]
    assert whole.resumed_at == []
    assert run.seconds > 0


def test_a_run_may_be_interrupted_many_times(tmp_path):
    whole, final = run_of("mamba2", tmp_path / "whole")
    for after in (2, 3, 8):
        interrupted("mamba2", tmp_path / "run", after)
    run, ended = run_of("mamba2", tmp_path / "run")
    assert told(run) == told(whole)
    assert same(ended, final)
    assert run.resumed_at == [2, 3, 8]


def test_a_run_that_was_done_takes_no_step(tmp_path):
    whole, final = run_of("hyena", tmp_path / "run")
    run, ended = run_of("hyena", tmp_path / "run", stop_after=12)
    assert told(run) == told(whole)
    assert same(ended, final)
    assert run.seconds == whole.seconds


def test_a_solved_run_stays_solved(tmp_path):
    def solve():
        return train(
            Scripted(lambda call: 1.0),
            zeros,
            recipe(watch_at=(3,), stop_at=0.5),
            ranks=HERE,
            watch=lambda: 0.5,
            keeping=Keeping(path=tmp_path / "run", every_s=0, written_by="me"),
        )

    assert solve().steps == 3
    assert solve().steps == 3


@pytest.mark.parametrize("left", ["nothing", "other code's", "damaged"])
def test_without_a_checkpoint_to_use_the_run_starts_anew(tmp_path, left):
    path = tmp_path / "run"
    whole, final = run_of("rwkv7", tmp_path / "whole")
    options = {"nothing": {"every_s": 3600}, "other code's": {"written_by": "another"}}
    interrupted("rwkv7", path, 7, **options.get(left, {}))
    assert path.exists() is (left != "nothing")
    if left == "damaged":
        path.write_bytes(path.read_bytes()[:-100])
    run, ended = run_of("rwkv7", path)
    assert run.resumed_at == []
    assert told(run) == told(whole)
    assert same(ended, final)


def test_checkpoints_keep_their_distance(tmp_path, monkeypatch):
    now, kept = 0.0, []

    def on_step(step):
        nonlocal now
        now += 1.0

    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    monkeypatch.setattr(
        checkpoint, "write", lambda path, tensors, about: kept.append(len(tensors["losses"]))
    )
    train(
        Scripted(lambda call: 1.0),
        zeros,
        recipe(),
        ranks=HERE,
        keeping=Keeping(path=tmp_path / "run", every_s=4, written_by="me"),
        on_step=on_step,
    )
    assert kept == [5, 9]


class Idle(nn.Module):
    """Has parameters that no gradient reaches."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(V, V)
        self.unused = nn.Linear(V, V)
        self.frozen = nn.Parameter(torch.ones(V), requires_grad=False)

    def forward(self, inputs):
        features = nn.functional.one_hot(inputs, V).float() * self.frozen
        return SimpleNamespace(logits=self.used(features))


def test_parameters_without_a_gradient_are_kept_too(tmp_path):
    def run(on_step=lambda step: None, name="run"):
        torch.manual_seed(0)
        model = Idle()
        keeping = Keeping(path=tmp_path / name, every_s=0, written_by="me")
        return train(
            model, batches(), recipe(), ranks=HERE, keeping=keeping, on_step=on_step
        ), weights(model)

    def interrupt(step):
        if step == 5:
            raise Interrupted

    whole, final = run(name="whole")
    with pytest.raises(Interrupted):
        run(interrupt)
    again, ended = run()
    assert again.resumed_at == [5]
    assert again.losses == whole.losses
    assert same(ended, final)
