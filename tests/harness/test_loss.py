import json
import math
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from harness import data, loss, record, run, trials
from harness.ranks import Ranks
from harness.trial import Place
from harness.trials import LossGrid, trial_cells

CEILINGS = {"copy_bytes_per_s": 1e15, "matmul_flops_per_s_float32": 1e15, "exp2_per_s": 1e15}
SIZES = {"transformer": "d32h16", "mamba2": "d32h16", "rwkv7": "d32h16", "hyena": "d32"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The name of a corpus of words that repeat, with letters of two bytes."""
    folder = tmp_path_factory.mktemp("text")
    draws = random.Random(0)
    words = ["".join(draws.choices("abcdeé", k=draws.randint(2, 5))) for _ in range(40)]
    for number in range(40):
        (folder / f"{number}.txt").write_text(" ".join(draws.choices(words, k=300)))
    return f"files:{folder}/*.txt"


def grid_of(corpus, arch="mamba2", **fields):
    return LossGrid(
        **{
            "archs": arch,
            "lengths": 16,
            "size": SIZES[arch],
            "batch": 4,
            "tokens": 20 * 4 * 16,
            "corpus": corpus,
            "evaluate_at": [32, 64],
            "validation_tokens": 256,
            "validation_block": 64,
            "learning_rates": 1e-2,
            **fields,
        }
    )


def case_of(*args, **fields):
    (case,) = trial_cells([grid_of(*args, **fields)])
    return case


def measured(case, monkeypatch):
    """Metrics, samples and the trained model of a case."""
    models = []
    build = loss.build_model
    with monkeypatch.context() as patch:
        patch.setattr(loss, "build_model", lambda *args: models.append(build(*args)) or models[-1])
        metrics, samples = loss.measure(case, Place(ranks=Ranks("cpu")))
    (model,) = models
    return metrics, samples, model


@torch.no_grad()
def folded(model, windows):
    """The loss of every target, (windows, T) in nats, from one token after another."""
    inputs, targets = windows
    state = model.init_state(len(inputs), inputs.shape[1])
    losses = []
    for place in range(inputs.shape[1]):
        logits, state = model.decode(inputs[:, place], state)
        chosen = logits.double().log_softmax(-1).gather(1, targets[:, place, None])
        losses.append(-chosen[:, 0])
    return torch.stack(losses, 1)


# What is measured


@pytest.mark.parametrize("unit", ["byte", "character"])
@pytest.mark.parametrize("arch", SIZES)
def test_validation_is_what_the_model_loses_token_by_token(corpus, monkeypatch, arch, unit):
    metrics, samples, model = measured(case_of(corpus, arch, unit=unit), monkeypatch)
    text = data.load(corpus, unit)
    assert (text.bytes_per_token == 1) is (unit == "byte")
    a_bit = math.log(2) * text.bytes_per_token
    assert samples["evaluated_at"] == [16, 32, 64]
    found = {}
    for n, said in zip((16, 32, 64), samples["evaluated_loss_bits_per_byte"], strict=True):
        found[n] = folded(model, text.validation_windows(n, 256, 64))
        assert found[n].numel() == 256
        assert said == pytest.approx(found[n].mean().item() / a_bit, abs=1e-5)
    assert metrics["val_loss_bits_per_byte"] == samples["evaluated_loss_bits_per_byte"][0]
    nats = metrics["val_loss_nats_per_byte" if unit == "byte" else "val_loss_nats_per_char"]
    assert nats == pytest.approx(metrics["val_loss_bits_per_byte"] * a_bit)
    assert ("val_loss_nats_per_byte" in metrics) is (unit == "byte")
    for name, n in (("position", 16), ("longest_position", 64)):
        by_place = found[n].mean(0) / a_bit
        low = 0
        for place, value in zip(samples[name], samples[f"{name}_loss_bits_per_byte"], strict=True):
            high = round(2 * place - 1 - low)
            assert value == pytest.approx(by_place[low:high].mean().item(), abs=1e-5)
            low = high
        assert low == n


def test_all_lengths_validate_on_the_same_tokens(corpus, monkeypatch):
    seen = {}
    by_place = loss.by_place

    def watch(model, windows, *rest):
        seen[windows[1].shape[1]] = windows[1].flatten()
        return by_place(model, windows, *rest)

    monkeypatch.setattr(loss, "by_place", watch)
    loss.measure(case_of(corpus), Place(ranks=Ranks("cpu")))
    assert set(seen) == {16, 32, 64}
    assert torch.equal(seen[16], seen[32])
    assert torch.equal(seen[16], seen[64])


def test_what_is_recorded_of_a_run(corpus, monkeypatch):
    shares = []
    case = case_of(corpus, tokens=50 * 4 * 16)
    place = Place(ranks=Ranks("cpu"), on_progress=shares.append)
    build, models = loss.build_model, []
    monkeypatch.setattr(
        loss, "build_model", lambda *args: models.append(build(*args)) or models[-1]
    )
    metrics, samples = loss.measure(case, place)
    (model,) = models
    text = data.load(corpus)
    assert shares == [step / 50 for step in range(1, 51)]
    losses = samples["train_loss_bits_per_byte"]
    assert len(losses) == 50
    assert losses[0] == metrics["train_loss_bits_per_byte_first"] == pytest.approx(8, rel=0.1)
    assert metrics["train_loss_bits_per_byte_last"] == pytest.approx(sum(losses[-2:]) / 2)
    assert metrics["val_loss_bits_per_byte"] < 0.7 * losses[0]
    assert samples["watched_step"] == [6, 12, 19, 25, 31, 38, 44, 50]
    assert samples["watched_s"] == sorted(samples["watched_s"])
    assert samples["watched_s"][-1] == metrics["train_s"]
    # It looks at the first 16,384 tokens of the validation, which are all there are.
    assert samples["watched_loss_bits_per_byte"][-1] == metrics["val_loss_bits_per_byte"]
    assert samples["resumed_at_step"] == []
    assert metrics["tokens"] == 50 * 4 * 16
    assert metrics["tokens_per_s"] == pytest.approx(3200 / metrics["train_s"])
    assert metrics["train_flops"] == 50 * 3 * model.forward_flops(4, 16)
    assert metrics["params"] == sum(p.numel() for p in model.parameters())
    assert metrics["state_bytes"] == model.state_bytes(1, 16)
    assert metrics["peak_bytes"] is None or metrics["peak_bytes"] >= 0
    assert metrics["corpus_sha256"] == text.sha256
    assert metrics["corpus_documents"] == 40
    assert metrics["corpus_train_tokens"] == len(text.train)
    assert metrics["corpus_validation_tokens"] == len(text.validation)
    assert metrics["vocab_size"] == 256
    json.dumps([metrics, samples], allow_nan=False)


def test_the_entropies_are_those_of_the_validation_text(corpus, monkeypatch):
    metrics, *_ = measured(case_of(corpus, unit="character"), monkeypatch)
    text = data.load(corpus, "character")
    tokens = text.validation.tolist()

    def entropy(counts):
        total = sum(counts.values())
        return -sum(n / total * math.log2(n / total) for n in counts.values())

    pairs = Counter(pairwise(tokens))
    one, pair = entropy(Counter(tokens)), entropy(pairs) - entropy(Counter(tokens[:-1]))
    assert metrics["unigram_entropy_bits_per_byte"] == pytest.approx(one / text.bytes_per_token)
    assert metrics["bigram_entropy_bits_per_byte"] == pytest.approx(pair / text.bytes_per_token)
    assert pair < one


def test_weights_are_drawn_from_the_seed(corpus):
    def weights(**fields):
        return loss.build_model(case_of(corpus, **fields), 256, 64, "cpu").state_dict()

    one, same, other = weights(), weights(learning_rates=1e-3, tokens=640), weights(seeds=1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    for name in ("embedding.weight", "blocks.0.in_proj.weight", "blocks.1.in_proj.weight"):
        assert not torch.equal(one[name], other[name])


def test_hyena_has_room_for_the_longest_length(corpus, monkeypatch):
    *_, model = measured(case_of(corpus, "hyena"), monkeypatch)
    assert {block.config.max_len for block in model.blocks} == {64}
    *_, model = measured(case_of(corpus, "hyena", evaluate_at=[]), monkeypatch)
    assert {block.config.max_len for block in model.blocks} == {16}


def test_all_models_of_a_seed_see_the_same_batches_and_no_step_another_s(corpus, monkeypatch):
    def seen(arch, **fields):
        found = []
        train = loss.training.train

        def watch(model, batch, recipe, **rest):
            found.extend(batch(step)[0] for step in range(recipe.steps))
            return train(model, batch, recipe, **rest)

        with monkeypatch.context() as patch:
            patch.setattr(loss.training, "train", watch)
            loss.measure(case_of(corpus, arch, tokens=5 * 64, **fields), Place(ranks=Ranks("cpu")))
        return torch.stack(found)

    first = seen("mamba2")
    assert first.shape == (5, 4, 16)
    assert torch.equal(first, seen("hyena", learning_rates=1e-3))
    assert not torch.equal(first, seen("mamba2", seeds=1))
    assert len({tuple(row) for row in first.flatten(0, 1).tolist()}) == 20


@pytest.mark.parametrize("T", [1, 2, 3, 7, 16, 1000, 4096])
def test_losses_by_position_lie_in_bins_that_widen_and_average_back(T):
    losses = torch.rand(T, dtype=torch.float64, generator=torch.Generator().manual_seed(T))
    places, values = loss.binned(losses)
    widths, low = [], 0
    for place in places:
        high = round(2 * place - 1 - low)
        widths.append(high - low)
        low = high
    assert low == T
    assert min(widths) >= 1
    assert places[0] == 1
    total = sum(width * value for width, value in zip(widths, values, strict=True))
    assert total / T == pytest.approx(losses.mean().item())
    assert values[0] == losses[0].item()
    assert len(values) <= 4 * math.log2(T) + 2
    assert all(width <= 0.2 * place + 1 for width, place in zip(widths, places, strict=True))


def test_a_bfloat16_run_validates_in_bfloat16_and_comes_to_about_the_same(corpus, monkeypatch):
    exact, *_ = measured(case_of(corpus), monkeypatch)
    rounded, *_ = measured(case_of(corpus, dtype="bfloat16"), monkeypatch)
    assert rounded["val_loss_bits_per_byte"] != exact["val_loss_bits_per_byte"]
    assert rounded["val_loss_bits_per_byte"] == pytest.approx(
        exact["val_loss_bits_per_byte"], rel=0.03
    )


def test_a_validation_loss_that_is_no_number_is_a_divergence(corpus, monkeypatch):
    by_place = loss.by_place

    def broken(model, windows, *rest):
        found = by_place(model, windows, *rest)
        return found + (math.nan if len(found) == 64 else 0)

    monkeypatch.setattr(loss, "by_place", broken)
    with pytest.raises(FloatingPointError, match=r"^the validation loss is nan at T = 64$"):
        loss.measure(case_of(corpus), Place(ranks=Ranks("cpu")))


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "text").write_text("ab cd" * 100)
    case = case_of(f"files:{tmp_path}/text", validation_block=128)
    with pytest.raises(ValueError, match="validation tokens are too few"):
        loss.measure(case, Place(ranks=Ranks("cpu")))


# A run in its worker

SWEEP = f"""
import json, sys
from harness import run, trials
run.Launcher.measure_ceilings = lambda self, dtypes: {CEILINGS}
grid = trials.LossGrid(**json.loads(sys.argv[1]))
trials.run([grid], sys.argv[2], device="cpu", threads=1, checkpoint_every_s=0)
"""


def steps_kept(path):
    """Steps in a checkpoint, 0 where there is none yet."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice("losses").get_shape()[0]
    except (FileNotFoundError, SafetensorError):
        return 0


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_sweep_that_is_killed_goes_on_to_the_last_bit(corpus, tmp_path, monkeypatch):
    fields = vars(grid_of(corpus, tokens=200 * 4 * 16))
    (case,) = trial_cells([LossGrid(**fields)])
    kept = tmp_path / "killed" / "checkpoints" / f"{case.key}.safetensors"
    command = [sys.executable, "-P", "-c", SWEEP, json.dumps(fields), str(tmp_path / "killed")]
    sweeping = subprocess.Popen(command, env=run.child_environment())
    try:
        wait_until(lambda: steps_kept(kept) >= 20 or sweeping.poll() is not None)
        (worker,) = children(sweeping.pid)
    finally:
        sweeping.send_signal(signal.SIGKILL)
        sweeping.wait()
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), 10)
    taken = steps_kept(kept)
    assert 20 <= taken < 200
    assert record.load(tmp_path / "killed")[0] == []

    monkeypatch.setattr(run.Launcher, "measure_ceilings", lambda self, dtypes: CEILINGS)
    seen = []
    trials.run(
        [LossGrid(**fields)],
        tmp_path / "killed",
        device="cpu",
        threads=1,
        on_finish=lambda measurement, known: seen.append(known),
    )
    assert seen == [False]
    (killed,) = record.load(tmp_path / "killed")[0]
    assert killed.status == "ok", killed.detail
    assert not list(tmp_path.rglob("*.safetensors*"))
    assert killed.samples["resumed_at_step"] == [taken]
    metrics, samples = loss.measure(case, Place(ranks=Ranks("cpu")))  # never interrupted
    assert len(samples["train_loss_bits_per_byte"]) == 200
    for name in (
        "train_loss_bits_per_byte",
        "watched_step",
        "watched_loss_bits_per_byte",
        "evaluated_loss_bits_per_byte",
        "longest_position_loss_bits_per_byte",
    ):
        assert killed.samples[name] == samples[name], name
    assert killed.metrics["val_loss_bits_per_byte"] == metrics["val_loss_bits_per_byte"]
