import io
import json

import pytest
from rich.console import Console

from harness import curves, plot, summary
from runs import write_curve


def linear(n):
    return 0.002 * n


def square(n):
    return 1e-6 * n**2


@pytest.fixture
def run(tmp_path):
    write_curve(tmp_path, "transformer", square)
    write_curve(tmp_path, "mamba2", linear)
    write_curve(tmp_path, "hyena", lambda n: 0.01 * n, failed={16384: "oom", 8192: "oom"})
    return tmp_path


def test_classes_and_tails_stand_beside_the_counted_ones(run):
    table = summary.growth(curves.load(run)).set_index("arch")
    assert list(table.index) == ["transformer", "mamba2", "hyena"]
    assert list(table["measured"]) == ["n²", "n", "n"]
    assert list(table["counted_flops"]) == ["n²", "n", "n"]
    row = table.loc["transformer"]
    assert row["tail_low"] < 2 < row["tail_high"]
    assert row["tail_counted"] == pytest.approx(2, abs=0.01)
    assert (row["tail_first"], row["tail_last"]) == (2048, 16384)
    assert row["tail_memory"] == pytest.approx(1)
    assert list(table["processes"]) == [3, 3, 3]
    assert list(table["departure"]) == ["none"] * 3


def test_censored_points_are_named_and_not_fitted(run):
    row = summary.growth(curves.load(run)).set_index("arch").loc["hyena"]
    assert row["censored"] == "oom at 8,192, oom at 16,384"
    assert (row["lengths"], row["last"]) == (5, 4096)


def test_the_curve_ends_where_one_process_of_three_did(tmp_path):
    """The times of the two others would be those of the lucky."""
    for status in ("timeout", "crashed"):
        write_curve(tmp_path / status, "rwkv7", linear)
        for path in (tmp_path / status / "records").glob("*.json"):
            document = json.loads(path.read_text())
            if document["case"]["seq_len"] == 16384 and document["case"]["replicate"] == 1:
                document.update(status=status, reason="slow", metrics={}, samples={})
                path.write_text(json.dumps(document))
        ((curve,),) = [c.curves for c in curves.load(tmp_path / status)]
        if status == "timeout":
            assert curve.censored == [(16384, "timeout (1 of 3)")]
            assert curve.lengths[-1] == 8192
        else:  # a bug says nothing about the time of the others
            assert (curve.censored, curve.lengths[-1], curve.points.processes) == ([], 16384, 2)


def test_an_architecture_without_any_time_stands_in_the_table(tmp_path):
    write_curve(tmp_path, "transformer", square, failed={256 << k: "oom" for k in range(7)})
    write_curve(tmp_path, "mamba2", linear)
    found = curves.load(tmp_path)
    assert list(summary.growth(found)["measured"]) == ["no time", "n"]
    assert "| Transformer |  | no time (oom at 256, " in summary.markdown(found)
    assert plot.draw(tmp_path).paths


def test_a_token_budget_and_constant_batches_in_one_directory_are_told_apart(tmp_path):
    write_curve(tmp_path, "mamba2", linear, tokens=16384)
    write_curve(tmp_path, "mamba2", linear, tokens=8192, lengths=(256, 512, 1024, 2048, 4096, 8192))
    write_curve(tmp_path, "mamba2", linear, lengths=(256, 512, 1024, 2048))
    write_curve(tmp_path, "mamba2", linear, lengths=(300, 600, 1200, 2400), batch=2)
    found = {c.common["batch"]: c.curves[0].lengths for c in curves.load(tmp_path)}
    assert list(found) == ["B·T = 16,384", "B·T = 8,192", "B = 1", "B = 2"]
    assert found["B·T = 16,384"] == [256 << k for k in range(7)]
    assert found["B = 1"] == [256, 512, 1024, 2048]


def test_a_crossover_names_who_is_faster_beyond_it(run):
    table = summary.crossovers(curves.load(run)).set_index(["a", "b"])
    row = table.loc["transformer", "mamba2"]
    assert row["verdict"] == "in range"
    assert row["low"] < 2000 < row["high"]
    assert row["faster_after"] == "mamba2"
    assert table.loc["mamba2", "hyena"]["verdict"] == "none in range"
    # Of lengths that both were measured at.
    assert table.loc["transformer", "hyena"]["verdict"] == "extrapolated"


def test_where_the_time_leaves_the_count_is_said_from_which_length(tmp_path):
    write_curve(tmp_path, "mamba2", lambda n: 0.002 * n + 1e-10 * n**3, flops=linear)
    write_curve(tmp_path, "rwkv7", lambda n: 1 + 0.002 * n, flops=linear)
    table = summary.growth(curves.load(tmp_path)).set_index("arch")
    assert table.loc["mamba2", "departure"].startswith("from 1,024: 1.9")
    assert table.loc["rwkv7", "departure"].startswith("to 2,048: 0.59")
    assert "counted 1.00" in table.loc["rwkv7", "departure"]


def test_one_process_is_not_judged(tmp_path):
    write_curve(tmp_path, "transformer", square, processes=1)
    write_curve(tmp_path, "mamba2", linear, processes=1)
    found = curves.load(tmp_path)
    assert set(summary.growth(found)["departure"]) == {"not judged under 3 processes"}
    text = summary.markdown(found)
    assert "| Transformer | n² | n² (1 process) | 2.0" in text
    assert "[" not in text.split("| Transformer |")[1].split("\n")[0]
    assert "| Transformer, Mamba-2 | not judged under 3 processes |  |  |" in text
    (row,) = summary.crossovers(found).to_dict("records")
    assert (row["verdict"], row["length"], row["low"]) == ("not judged", None, None)


def test_three_lengths_are_no_fit(tmp_path):
    write_curve(tmp_path, "transformer", square, lengths=(256, 512, 1024))
    found = curves.load(tmp_path)
    assert list(summary.growth(found)["measured"]) == ["no fit: 3 of 4 lengths"]
    assert summary.crossovers(found).empty
    assert "no fit: 3 of 4 lengths" in summary.markdown(found)


def test_a_token_budget_is_fitted_a_sequence(tmp_path):
    write_curve(tmp_path, "mamba2", linear, tokens=16384)
    (row,) = summary.growth(curves.load(tmp_path)).to_dict("records")
    assert row["batch"] == "B·T = 16,384"
    assert row["measured"] == "n"
    assert row["tail_value"] == pytest.approx(1, abs=0.05)


def test_decoding_is_judged_by_bytes(tmp_path):
    write_curve(tmp_path, "transformer", lambda n: 1 + n / 2048, phase="decode", level="model")
    (row,) = summary.growth(curves.load(tmp_path)).to_dict("records")
    assert (row["measured"], row["counted_bytes"]) == ("c + n", "c + n")
    assert row["departure"] == "none"


def test_terminal_and_markdown_say_the_same(run):
    found = curves.load(run)
    console = Console(width=140, file=io.StringIO())
    for table in summary.tables(found):
        console.print(table)
    shown, text = console.file.getvalue(), summary.markdown(found)
    for words in (
        "op forward, d256, B = 1, float32, torch",
        "crossover",
        "hardware departure",
        "n (oom at 8,192, oom at 16,384)",
        "Mamba-2 throughout",
        "(extrapolated)",
    ):
        assert words in shown
        assert words in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("| ")]
    assert set(widths) == {len(summary.GROWTH) + 1, len(summary.CROSSOVERS) + 1}


def test_the_markdown_says_where_the_numbers_come_from(run):
    text = summary.markdown(curves.load(run))
    assert "a CPU, 2 threads · torch 2 · Python 3 · commit abcdef0123" in text


def test_a_name_with_a_bar_keeps_the_markdown_table_whole(tmp_path):
    write_curve(tmp_path, "a|b", linear)
    assert "| a\\|b |" in summary.markdown(curves.load(tmp_path))
