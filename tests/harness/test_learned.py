import io
import math

import pandas as pd
import pytest
from rich.console import Console

from harness import learned, learned_figures, learned_tables, report
from harness.learned_laws import laws
from runs import write_curve
from training_runs import loss_run, measurement, recall_run, write


def found(tmp_path, runs):
    """The studies of these runs."""
    return learned.load(write(tmp_path, runs))


def seeds(values, make=loss_run, **changed):
    """A run for each value, of seeds from 0 on."""
    return [make(seed=seed, **changed, **_value(make, v)) for seed, v in enumerate(values)]


def _value(make, value):
    if value == "diverged":
        return {"status": value}
    return {"loss" if make is loss_run else "accuracy": value}


def shown(tables, width=200):
    console = Console(width=width, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def test_the_best_rate_has_the_lowest_mean_over_its_seeds(tmp_path):
    runs = seeds([2.0, 2.1, 2.2], rate=5e-3) + seeds([1.9, 2.3, 2.4], rate=2e-3)
    runs += seeds([2.3, 2.2, 2.2], rate=1e-2)
    (row,) = learned.points(found(tmp_path, runs)).to_dict("records")
    assert row["learning_rate"] == 5e-3
    assert row["value"] == pytest.approx(2.1)
    assert (row["n"], row["rates_tried"], row["diverged"], row["edge"]) == (3, 3, 0, "")
    half = 4.302653 * 0.1 / math.sqrt(3)  # Student's t of two degrees of freedom
    assert row["low"] == pytest.approx(2.1 - half, abs=1e-6)
    assert row["high"] == pytest.approx(2.1 + half, abs=1e-6)


def test_the_best_rate_of_a_task_has_the_highest_mean(tmp_path):
    runs = seeds([0.5, 0.6], recall_run, rate=1e-3) + seeds([0.4, 0.9], recall_run, rate=2e-3)
    (row,) = learned.points(found(tmp_path, runs)).to_dict("records")
    assert (row["learning_rate"], row["value"]) == (2e-3, pytest.approx(0.65))


def test_there_is_no_interval_under_three_seeds(tmp_path):
    studies = found(tmp_path, seeds([2.0, 2.1]))
    (row,) = learned.points(studies).to_dict("records")
    assert row["low"] is None
    assert row["high"] is None
    assert "not available" in shown(learned_tables.tables(studies))


def test_the_interval_of_an_accuracy_ends_at_one(tmp_path):
    (row,) = learned.points(found(tmp_path, seeds([0.9, 1.0, 1.0], recall_run))).to_dict("records")
    assert row["high"] == 1
    assert row["low"] == pytest.approx(0.966667 - 4.302653 * 0.057735 / math.sqrt(3), abs=1e-5)


def test_a_rate_at_which_a_seed_diverged_is_not_chosen_unless_there_is_no_other(tmp_path):
    good, bad = seeds([2.5, 2.5], rate=1e-3), seeds([1.0, "diverged"], rate=2e-3)
    (row,) = learned.points(found(tmp_path / "a", good + bad)).to_dict("records")
    assert (row["learning_rate"], row["diverged"], row["unfinished"]) == (1e-3, 1, "1 diverged")
    (row,) = learned.points(found(tmp_path / "b", bad)).to_dict("records")
    assert (row["learning_rate"], row["value"], row["n"]) == (2e-3, 1.0, 1)


@pytest.mark.parametrize(
    ("ends", "edge"),
    [
        ({1e-3: 2.0, 2e-3: 2.1, 4e-3: 2.2}, "edge of the grid"),
        ({1e-3: 2.2, 2e-3: 2.1, 4e-3: 2.0}, "edge of the grid"),
        ({1e-3: 2.2, 2e-3: 2.0, 4e-3: 2.1}, ""),
        ({1e-3: 2.2, 2e-3: 2.0, 4e-3: "diverged"}, ""),
        ({1e-3: 2.2, 2e-3: 2.0, 4e-3: "timeout"}, "edge of the grid"),
        ({2e-3: 2.0}, "only rate tried"),
    ],
)
def test_a_best_rate_at_the_edge_of_what_is_known_is_flagged(tmp_path, ends, edge):
    runs = [
        loss_run(rate=rate, **({"status": end} if isinstance(end, str) else {"loss": end}))
        for rate, end in ends.items()
    ]
    studies = found(tmp_path, runs)
    assert learned.points(studies)["edge"].tolist() == [edge]
    text = shown(learned_tables.tables(studies))
    assert ("edge of the grid" in text) == (edge == "edge of the grid")


def test_a_solved_task_has_no_better_rate_beyond_the_edge(tmp_path):
    for accuracy, edge in ((0.999, ""), (0.99, "edge of the grid")):
        runs = [recall_run(rate=1e-3), recall_run(rate=2e-3, accuracy=accuracy)]
        studies = found(tmp_path / str(accuracy), runs)
        assert learned.points(studies)["edge"].tolist() == [edge]


def test_the_whole_grid_of_rates_is_reported(tmp_path):
    runs = seeds([2.0, 2.2], rate=1e-3) + seeds([2.4, "diverged"], rate=2e-3)
    runs += seeds(["diverged", "diverged"], rate=4e-3)
    studies = found(tmp_path, runs)
    grid = learned.grid(studies)
    assert grid["learning_rate"].tolist() == [1e-3, 2e-3, 4e-3]
    assert grid["value"].tolist()[:2] == pytest.approx([2.1, 2.4])
    assert math.isnan(grid["value"].iloc[2])
    assert grid["n"].tolist() == [2, 1, 0]
    assert grid["best"].tolist() == [True, False, False]
    text = learned_tables.markdown(studies)
    assert "| rate 0.001 | rate 0.002 | rate 0.004 |" in text
    assert "| 2.100 (2) \\* | 2.400 (1), 1 diverged | 2 diverged |" in text


def test_points_without_a_finished_run_stay_visible(tmp_path):
    runs = [loss_run("mamba2"), *seeds(["diverged"] * 3, arch="hyena")]
    runs += [loss_run("rwkv7", status="oom"), loss_run("rwkv7", seed=1, status="timeout")]
    studies = found(tmp_path, runs)
    rows = learned.points(studies).set_index("arch")
    assert rows.loc["hyena", "unfinished"] == "3 diverged"
    assert rows.loc["hyena", "n"] == 0
    assert pd.isna(rows.loc["hyena", "value"])
    text = learned_tables.markdown(studies)
    assert "| Hyena | 64 | - | - | - | 0 | - | 3 diverged |" in text
    assert "1 oom, 1 timeout" in text


def test_rows_go_by_length_and_then_by_menu(tmp_path):
    archs = ("mamba2*3+transformer", "hyena", "transformer")
    studies = found(tmp_path, [loss_run(a, n) for a in archs for n in (256, 64)])
    order = learned.points(studies)[["seq_len", "arch"]].to_numpy().tolist()
    by_menu = ["transformer", "hyena", "mamba2*3+transformer"]
    assert order == [[n, arch] for n in (64, 256) for arch in by_menu]
    assert "| mamba2\\*3+transformer | 256 |" in learned_tables.markdown(studies)


def test_what_is_not_alike_is_not_in_one_study(tmp_path):
    options = {"corpus": "files:x.txt"}
    runs = [
        loss_run("mamba2"),
        loss_run("mamba2", 256),
        loss_run("mamba2", options=options),
        loss_run("mamba2", tokens=1 << 18),
        loss_run("mamba2", size="1M", metrics={"params": 1_000_000}),
        loss_run("mamba2", dtype="bfloat16"),
        recall_run("mamba2"),
        recall_run("mamba2", options={"task": "parity"}),
    ]
    assert sorted(len(study.runs) for study in found(tmp_path, runs)) == [1] * 6 + [2]


def test_matched_sizes_of_different_architectures_are_one_study(tmp_path):
    matched = [
        loss_run("transformer", size="d128h32l4", metrics={"params": 1_066_368}),
        loss_run("mamba2", size="1066K", metrics={"params": 1_060_000}),
    ]
    (study,) = found(tmp_path / "a", matched)
    assert study.common["size"] == "1066K / d128h32l4"
    same = [
        loss_run("mamba2", size="d128", metrics={"params": 1_066_368}),
        loss_run("mamba2", size="1066K", metrics={"params": 1_060_000}),
    ]
    assert len(found(tmp_path / "b", same)) == 2
    other = [
        loss_run("transformer", size="d128h32l4", metrics={"params": 1_200_000}),
        loss_run("mamba2", size="1066K", metrics={"params": 1_060_000}),
    ]
    assert len(found(tmp_path / "c", other)) == 2


def test_characters_have_nats_too_and_the_title_the_entropy(tmp_path):
    characters = loss_run(
        options={"unit": "character"}, metrics={"val_loss_nats_per_char": 1.88}, loss=2.5
    )
    for runs, said in (([characters], True), ([loss_run()], False)):
        text = learned_tables.markdown(found(tmp_path / str(said), runs))
        assert ("| nats a char |" in text) == said
        assert ("| 1.880 |" in text) == said
        assert "bigram entropy of the validation text 3.62 bits a byte" in text


def test_what_varies_in_a_task_has_a_column_and_the_rest_is_in_the_title(tmp_path):
    runs = [recall_run(settings={"pairs": pairs}) for pairs in (16, 2, 8, 4)]
    (study,) = found(tmp_path, runs)
    assert study.title.startswith("Task mqar (power 0.01, vocab_size 64): at most 1,000 steps")
    assert study.title.endswith("chance 0.031")
    assert [point.settings["pairs"] for point in study.points] == [2, 4, 8, 16]
    header = "| architecture | T | pairs | parameters | accuracy |"
    assert header in learned_tables.markdown([study])


def test_fields_of_blocks_have_columns(tmp_path):
    slow = {"block": {"decay_max": 1.0}}
    studies = found(tmp_path, [recall_run(), recall_run(accuracy=0.9, options=slow)])
    text = learned_tables.markdown(studies)
    assert "| architecture | decay_max | T | parameters | accuracy |" in text
    assert "| Mamba-2 | - | 64 | 50,000 | 0.500 |" in text
    assert "| Mamba-2 | 1 | 64 | 50,000 | 0.900 |" in text
    assert learned.points(studies)["decay_max"].dropna().tolist() == [1.0]


def test_a_law_along_the_lengths_takes_four_of_them(tmp_path):
    def runs(lengths):
        return [
            loss_run(length=n, seed=seed, loss=1.5 + 4 * n**-0.5 + 1e-4 * seed)
            for n in lengths
            for seed in range(3)
        ]

    (fitted,) = laws(found(tmp_path / "a", runs((64, 128, 256, 512, 1024))))
    assert (fitted.arch, fitted.along, fitted.points) == ("mamba2", "context length", 5)
    assert fitted.law.floor.value == pytest.approx(1.5, abs=0.01)
    assert fitted.law.exponent.value == pytest.approx(0.5, abs=0.01)
    assert fitted.law.seeds == 3
    (fitted,) = laws(found(tmp_path / "b", runs((64, 128, 256))))
    assert (fitted.law, fitted.reason) == (None, "no law: 3 of 4 points")
    assert laws(found(tmp_path / "c", runs((64,)))) == []


def test_a_law_takes_only_the_seeds_that_all_points_have(tmp_path):
    lengths = (64, 128, 256, 512)
    runs = [loss_run(length=n, loss=1.5 + 4 * n**-0.5) for n in lengths]
    runs += [loss_run(length=64, seed=1, loss=5.0)]
    (fitted,) = laws(found(tmp_path / "a", runs))
    assert fitted.law.seeds == 1
    assert fitted.law.floor.value == pytest.approx(1.5, abs=0.01)
    runs[0] = loss_run(length=64, seed=0, status="timeout")
    (fitted,) = laws(found(tmp_path / "b", runs))
    assert fitted.reason == "no law: no seed finished at all points"


def test_laws_along_parameters_tokens_and_compute(tmp_path):
    runs = []
    for budget in (1e15, 2e15, 4e15, 8e15):
        for k in range(-2, 3):
            params = round(3e5 * (budget / 1e15) ** 0.5 * 2**k)
            tokens = round(budget / 6 / params / 2048) * 2048
            loss = 1.5 + 40 * params**-0.4 + 400 * tokens**-0.4
            size, exact = f"{params / 1000:g}K", {"params": params, "train_flops": budget}
            runs.append(loss_run(size=size, tokens=tokens, loss=loss, metrics=exact))
    fitted = {one.along: one for one in laws(found(tmp_path, runs))}
    assert set(fitted) >= {"parameters and tokens", "compute"}
    joint = fitted["parameters and tokens"].law
    assert joint.params_exponent.value == pytest.approx(0.4, abs=0.02)
    assert joint.tokens_exponent.value == pytest.approx(0.4, abs=0.02)
    assert fitted["compute"].law.exponent.value == pytest.approx(0.5, abs=0.05)
    text = shown(learned_tables.tables(found(tmp_path / "again", runs)))
    assert "Best size of each compute budget (isoFLOP)" in text
    assert "N grows as C^0.5" in text


@pytest.mark.parametrize("along", ["parameters", "tokens"])
def test_a_law_along_sizes_or_budgets_holds_the_rest(tmp_path, along):
    x = [100_000 * 2**k for k in range(5)]
    runs = []
    for value in x:
        changed = {"size": f"{value // 1000}K", "metrics": {"params": value}}
        if along == "tokens":
            value = value // 100_000 * 2048 * 50
            changed = {"tokens": value}
        runs.append(loss_run(loss=1.2 + 30 * value**-0.3, **changed))
    (fitted,) = laws(found(tmp_path, runs))
    assert fitted.along == along
    assert fitted.law.floor.value == pytest.approx(1.2, abs=0.02)
    assert fitted.law.exponent.value == pytest.approx(0.3, abs=0.02)
    assert fitted.held == ("T = 64, 300K" if along == "tokens" else "T = 64, 131,072 tokens")


def test_a_law_along_tokens_is_of_one_size_and_one_along_sizes_of_one_budget(tmp_path):
    runs = [
        loss_run(size=size, tokens=tokens, metrics={"params": params})
        for size, params in (("300K", 300_000), ("600K", 600_000))
        for tokens in (1 << 17, 1 << 18)
    ]
    kinds = [(one.along, one.held, one.points) for one in laws(found(tmp_path, runs))]
    assert sorted(kinds) == [
        ("parameters", "T = 64, 131,072 tokens", 2),
        ("parameters", "T = 64, 262,144 tokens", 2),
        ("tokens", "T = 64, 300K", 2),
        ("tokens", "T = 64, 600K", 2),
    ]


def test_brackets_in_a_name_are_no_markup(tmp_path):
    runs = [loss_run("plugin[red]", options={"corpus": "files:[bold]*.txt"})]
    text = shown(learned_tables.tables(found(tmp_path, runs)))
    assert "files:[bold]*.txt" in text
    assert "plugin[red]" in text


def test_a_run_without_training_has_no_studies(tmp_path):
    assert found(tmp_path / "none", []) == []
    write_curve(tmp_path / "cost", "mamba2", lambda n: 0.002 * n, lengths=(64,), processes=1)
    assert learned.load(tmp_path / "cost") == []
    assert learned_tables.tables([]) == []


def test_the_report_shows_training_runs(tmp_path):
    write(tmp_path, [loss_run(), recall_run()])
    text = " ".join(shown(report.tables(report.frame(tmp_path))).split())  # a title may wrap
    assert "validation loss at the best learning rate" in text
    assert "accuracy at the best learning rate" in text


def test_records_of_before_are_read(tmp_path):
    options = {"corpus": "python-source", "learning_rate": 2e-3, "steps": 30}
    metrics = {"params": 1_002_048, "val_loss_bits_per_byte": 4.0, "train_s": 5.0}
    samples = {"train_loss_bits_per_byte": [8.0, 6.0, 4.0]}
    changed = {"size": "1M", "batch": 8}
    run = measurement("loss", "hyena", 256, 0, changed, options, "ok", metrics, samples)
    (study,) = found(tmp_path, [run])
    assert (study.common["unit"], study.common["tokens"]) == ("byte", 61_440)
    assert "| Hyena | 256 | 1,002,048 | 4.000 | not available | 1 | 0.002" in (
        learned_tables.markdown([study])
    )
    assert [picture.name for picture in learned_figures.drawn(study)] == ["steps"]
