import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from harness import figures, learned, learned_figures, plot
from training_runs import loss_run, recall_run, write

ARCHS = ("transformer", "mamba2", "rwkv7", "hyena", "mamba2*3+transformer")
BLUE = figures.STYLES["mamba2"]["color"]


@pytest.fixture(autouse=True)
def closed():
    """No figure is left open."""
    with plt.rc_context(figures.SETTINGS):
        yield
    plt.close("all")


def pictures(tmp_path, runs):
    """The figures of the one study of these runs, by name."""
    (study,) = learned.load(write(tmp_path, runs))
    return {picture.name: picture for picture in learned_figures.drawn(study)}


def lines(axes, color=BLUE, **properties):
    """The lines of a colour on some axes that have these properties, as lists of points."""
    return [
        np.column_stack(line.get_data()).tolist()
        for line in axes.lines
        if line.get_color() == color
        and len(line.get_xdata())
        and all(getattr(line, f"get_{name}")() == value for name, value in properties.items())
    ]


def labels(picture):
    return [text.get_text() for text in picture.figure.legends[0].get_texts()]


def test_loss_by_length_shows_means_seeds_intervals_law_and_entropy(tmp_path):
    losses = {n: [1.5 + 4 * n**-0.5 + x for x in (-0.01, 0, 0.01)] for n in (64, 128, 256, 512)}
    runs = [
        loss_run(length=n, seed=seed, loss=loss)
        for n, of_length in losses.items()
        for seed, loss in enumerate(of_length)
    ]
    drawn = pictures(tmp_path, runs)["lengths"]
    left, right = drawn.figure.axes
    (means,) = lines(left, marker="s")
    assert means == [[n, pytest.approx(np.mean(of_length))] for n, of_length in losses.items()]
    dots = lines(left, marker=".")
    assert dots == [[[n, pytest.approx(y)] for y in of_length] for n, of_length in losses.items()]
    half = 4.302653 * 0.01 / 3**0.5
    bars = [container[2][0].get_segments()[0] for container in left.containers]
    assert [bar[1][1] - bar[0][1] for bar in bars] == pytest.approx([2 * half] * 4, abs=1e-6)
    (law,) = lines(left, alpha=0.25)
    assert law[0] == [64, pytest.approx(2.0, abs=0.01)]
    assert labels(drawn)[0].startswith("Mamba-2: alpha 0.5")
    for axes in (left, right):
        assert [set(x.get_ydata()) for x in axes.lines if x.get_linestyle() == "--"][-1] == {3.62}
    (by_position,) = lines(right)
    assert by_position[0] == [1, pytest.approx(np.mean(losses[512]) + 1)]
    assert by_position[-1] == [512, pytest.approx(np.mean(losses[512]) + 1 / 512)]
    assert "T = 512" in right.get_xlabel()


def test_losses_that_rise_with_the_length_have_no_law(tmp_path):
    runs = [loss_run(length=n, loss=2 + n / 1000) for n in (64, 128, 256, 512)]
    drawn = pictures(tmp_path, runs)["lengths"]
    assert lines(drawn.figure.axes[0], alpha=0.25) == []
    assert labels(drawn)[0] == "Mamba-2"


def test_under_three_seeds_there_are_no_bars_and_with_one_no_dots(tmp_path):
    for count in (1, 2):
        runs = [loss_run(length=n, seed=s) for n in (64, 128) for s in range(count)]
        left = pictures(tmp_path / str(count), runs)["lengths"].figure.axes[0]
        assert list(left.containers) == []
        assert len(lines(left, marker=".")) == (2 if count == 2 else 0)


def test_one_length_has_no_panel_by_length(tmp_path):
    drawn = pictures(tmp_path, [loss_run()])["lengths"]
    (axes,) = drawn.figure.axes
    assert "position" in axes.get_xlabel()
    assert labels(drawn) == ["Mamba-2", learned_figures.ENTROPY]


def test_pareto_shows_seconds_and_flops_and_the_way_there(tmp_path):
    seconds = {64: 10.0, 256: 40.0}
    runs = [
        loss_run(length=n, seed=seed, loss=2 - n / 1000, metrics={"train_s": s + 2 * seed})
        for n, s in seconds.items()
        for seed in range(2)
    ]
    runs[2] = loss_run(length=256, loss=1.744, metrics={"train_s": 40.0, "foreign_load": 0.9})
    drawn = pictures(tmp_path, runs)["pareto"]
    left, right = drawn.figure.axes
    markers = lines(left, marker="s")
    assert markers == [[[11, pytest.approx(1.936)]], [[41, pytest.approx(1.744)]]]
    hollow = lines(left, marker="s", markerfacecolor="white")
    assert hollow == [[[41, pytest.approx(1.744)]]]
    flops = (6 * 300_000 * (1 << 17) + 64) / 1e12
    assert lines(right, marker="s")[0] == [[pytest.approx(flops), pytest.approx(1.936)]]
    ways = lines(left, alpha=0.5)
    assert len(ways) == 4
    assert ways[0][0] == [pytest.approx(10 / 8), pytest.approx(1.936 + 7)]
    assert ways[0][-1] == [10, pytest.approx(1.936)]
    assert lines(right, alpha=0.5)[0][-1] == [pytest.approx(flops), pytest.approx(1.936)]
    assert left.get_ylim()[1] < 3  # the first looks would take all of it
    assert labels(drawn)[-2:] == ["T = 64", "T = 256"]


def test_beyond_the_trained_length_markers_are_hollow(tmp_path):
    runs = [loss_run(length=256, loss=2.0, evaluate_at=[128, 512, 1024])]
    drawn = pictures(tmp_path, runs)["beyond"]
    (axes,) = drawn.figure.axes
    (whole,) = lines(axes, linestyle="--")
    assert [x for x, _ in whole] == [128, 256, 512, 1024]
    assert [y for _, y in whole] == pytest.approx([2.005, 2.01, 2.02, 2.04])
    (hollow,) = lines(axes, markerfacecolor="w")
    assert [x for x, _ in hollow] == [512, 1024]
    trained = [line.get_xdata()[0] for line in axes.lines if line.get_label() == "trained at"]
    assert trained == [256]
    assert {"extrapolated", "trained at"} < set(labels(drawn))
    assert "beyond" not in pictures(tmp_path / "not", [loss_run(length=256)])


def test_the_grid_of_rates_shows_the_best_and_what_diverged(tmp_path):
    ends = {1e-3: [2.2, 2.4], 2e-3: [2.0, 2.1], 4e-3: [1.9, "diverged"], 8e-3: ["diverged"] * 2}
    runs = []
    for rate, of_rate in ends.items():
        for seed, end in enumerate(of_rate):
            changed = {"status": end} if isinstance(end, str) else {"loss": end}
            runs.append(loss_run(rate=rate, seed=seed, **changed))
    drawn = pictures(tmp_path, runs)["rates"]
    (axes,) = drawn.figure.axes
    assert lines(axes, marker="s") == [
        [[1e-3, pytest.approx(2.3)], [2e-3, pytest.approx(2.05)], [4e-3, 1.9]]
    ]
    rings = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert [np.column_stack(ring.get_data()).tolist() for ring in rings] == [
        [[2e-3, pytest.approx(2.05)]]
    ]
    (crosses,) = lines(axes, marker="x")
    assert [x for x, _ in crosses] == [4e-3, 8e-3]
    assert "a seed diverged" in labels(drawn)
    assert axes.get_title() == "T = 64"
    assert "rates" not in pictures(tmp_path / "one", [loss_run()])


def test_the_training_loss_is_drawn_whole_and_smoothed(tmp_path):
    run = loss_run(loss=0.0)
    values = np.sin(np.arange(400)) + 5
    run.samples["train_loss_bits_per_byte"] = values.tolist()
    axes = pictures(tmp_path, [run])["steps"].figure.axes[0]
    (pale,) = lines(axes, alpha=0.25)
    assert [y for _, y in pale] == values.tolist()
    (dark,) = lines(axes, alpha=None)
    assert dark[0] == [8, pytest.approx(values[:8].mean())]  # 400 steps / 50
    assert dark[-1] == [400, pytest.approx(values[-8:].mean())]


def test_accuracy_by_pairs_has_a_panel_a_width_and_the_chance(tmp_path):
    runs = [
        recall_run(arch, accuracy=1 / pairs, size=size, settings={"pairs": pairs})
        for arch, sizes in (("mamba2", ("d16", "d64n8", "d64n32")), ("hyena", ("d16", "d64")))
        for size in sizes
        for pairs in (2, 4, 8)
    ]
    drawn = pictures(tmp_path, runs)
    by_pairs = drawn["by_pairs"]
    narrow, wide = by_pairs.figure.axes
    assert (narrow.get_title(), wide.get_title()) == ("width 16", "width 64")
    assert lines(narrow, linestyle="--") == [[[2, 0.5], [4, 0.25], [8, 0.125]]]
    looks = {
        str(line.get_label()): (line.get_color(), line.get_fillstyle())
        for line in wide.lines
        if "Mamba-2" in str(line.get_label())
    }
    # A size of no variant comes first, with the plain look.
    tints = [sum(to_rgb(look[0])) for look in looks.values()]
    assert len(looks) == 2
    assert len({*tints, sum(to_rgb(BLUE))}) == 3
    assert min(tints) > sum(to_rgb(BLUE))
    assert len({fill for _, fill in looks.values()} - {"full"}) == 2
    (chance,) = [line for line in narrow.lines if line.get_label() == "chance"]
    assert chance.get_ydata() == pytest.approx([1 / 32] * 3)
    assert narrow.get_xlabel() == "pairs"
    assert {"Mamba-2, N = 8", "Mamba-2, N = 32", "Hyena", "chance"} <= set(labels(by_pairs))
    assert sorted(drawn) == ["by_pairs", "cost_pairs2", "cost_pairs4", "cost_pairs8"]


def test_settings_that_vary_alone_have_a_figure_for_each_value_of_the_other(tmp_path):
    runs = [
        recall_run(length=n, settings={"pairs": pairs}, accuracy=pairs / n)
        for n in (64, 128)
        for pairs in (4, 8)
    ]
    drawn = pictures(tmp_path, runs)
    by = ["by_pairs_T64", "by_pairs_T128", "by_seq_len_pairs4", "by_seq_len_pairs8"]
    assert [name for name in drawn if name.startswith("by")] == by
    (axes,) = drawn["by_seq_len_pairs8"].figure.axes
    assert lines(axes) == [[[64, 0.125], [128, 0.0625]]]
    assert "pairs = 8" in drawn["by_seq_len_pairs8"].title


def test_settings_that_vary_together_have_one_figure_that_says_so(tmp_path):
    runs = [recall_run(length=16 * pairs, settings={"pairs": pairs}) for pairs in (4, 8)]
    drawn = pictures(tmp_path, runs)
    assert [name for name in drawn if name.startswith("by")] == ["by_pairs"]
    assert drawn["by_pairs"].figure.axes[0].get_xlabel() == "pairs (T with it)"


def test_accuracy_by_state_and_time(tmp_path):
    sizes = {"d16": (2048, 0.25), "d64": (8192, 1.0)}
    runs = []
    for size, (state, ms) in sizes.items():
        metrics = {"state_bytes": state, "forward_time_ms_p50_a_sequence": ms}
        if size == "d64":
            metrics["forward_foreign_load"] = 0.9
        metrics["params"] = state
        runs.append(recall_run(size=size, accuracy=ms / 2, metrics=metrics))
    drawn = pictures(tmp_path, runs)["cost"]
    left, right = drawn.figure.axes
    assert lines(left, marker="s") == [[[2, 0.125]], [[8, 0.5]]]
    assert lines(right, marker="s") == [[[0.25, 0.125]], [[1, 0.5]]]
    assert lines(right, markerfacecolor="white") == [[[1, 0.5]]]
    assert lines(left, markerfacecolor="white") == []
    assert left.get_xscale() == "log"
    assert labels(drawn) == ["Mamba-2", "chance", "width 16", "width 64"]


def test_models_with_other_fields_of_blocks_are_told_apart(tmp_path):
    runs = [
        recall_run(size=size, accuracy=state / 10, metrics={"state_bytes": 1024 * state}, **given)
        for size, state in (("d64n8", 1), ("d64n16", 2))
        for given in ({}, {"options": {"block": {"decay_max": 1.0}}, "settings": {"pairs": 4}})
    ]
    drawn = pictures(tmp_path, runs)
    left, _ = drawn["cost"].figure.axes
    joined = lines(left, marker="", linestyle="--")
    assert joined == [[[1, 0.1], [2, 0.2]]] * 2  # one line for each
    assert labels(drawn["cost"])[:2] == ["Mamba-2", "Mamba-2, decay max 1"]
    fills = {line.get_fillstyle() for line in left.lines if line.get_label() == "Mamba-2"}
    assert fills == {"full"}
    fills = {line.get_fillstyle() for line in left.lines if "decay" in str(line.get_label())}
    assert fills == {"left"}


def test_fields_of_blocks_are_named_where_no_other_model_has_others(tmp_path):
    slow = {"options": {"block": {"decay_max": 1.0}}}
    runs = [
        recall_run(rate=rate, settings={"pairs": pairs}, **slow)
        for rate in (1e-3, 2e-3)
        for pairs in (2, 4)
    ]
    drawn = pictures(tmp_path, runs)
    for name in ("by_pairs", "rates"):
        assert labels(drawn[name])[0] == "Mamba-2, decay max 1"


def test_more_panels_than_a_page_holds_are_several_figures(tmp_path):
    runs = [
        recall_run(rate=rate, settings={"pairs": pairs})
        for rate in (1e-3, 2e-3)
        for pairs in range(1, 12)
    ]
    drawn = pictures(tmp_path, runs)
    assert len(drawn["rates_1"].figure.axes) == 9
    assert len(drawn["rates_2"].figure.axes) == 2


def test_where_everything_diverged_there_is_no_figure(tmp_path):
    out = write(tmp_path, [loss_run(status="diverged"), recall_run(status="diverged")])
    assert [list(learned_figures.drawn(study)) for study in learned.load(out)] == [[], []]
    with pytest.raises(plot.NothingToDrawError, match="no finished cell"):
        plot.draw(out)


def test_the_footer_says_how_a_figure_was_made(tmp_path):
    runs = [loss_run(rate=rate, seed=seed) for rate in (1e-3, 2e-3) for seed in range(3)]
    runs += [loss_run(rate=4e-3, status="diverged")]
    footer = pictures(tmp_path, runs)["lengths"].footer
    assert "Seeds a point: 3; learning rates tried: 3. 1 of 7 runs did not finish." in footer
    assert "Corpus python-source, SHA-256 01234567; 131,072 tokens a run." in footer
    assert "a CPU, 2 threads" in footer
    assert "the law" not in footer


def test_the_footer_explains_a_law_where_there_are_lengths_for_one(tmp_path):
    runs = [loss_run(length=n, loss=1.5 + 4 * n**-0.5) for n in (64, 128, 256, 512)]
    drawn = pictures(tmp_path, runs)
    assert learned_figures.LAW in drawn["lengths"].footer
    assert learned_figures.LAW not in drawn["pareto"].footer


def many():
    """Runs that fill every figure."""
    runs = []
    for i, arch in enumerate(ARCHS):
        for rate, n, seed in itertools.product((2e-3, 5e-3), (64, 256, 1024, 2048), range(3)):
            loss = 2 + i / 10 + 3 * n**-0.35 + 0.01 * seed
            runs.append(loss_run(arch, n, rate, seed, loss, evaluate_at=[4096], batch=1))
        for rate, pairs, size in itertools.product((1e-3, 1e-2), (4, 8, 16), ("d16", "d64")):
            changed = {"size": size, "settings": {"pairs": pairs}, "evaluate_at": [256]}
            runs.append(recall_run(arch, 64, rate, accuracy=(i + 1) / pairs / 2, **changed))
    runs.append(loss_run("hyena", 64, 1e-2, status="diverged", evaluate_at=[4096], batch=1))
    return runs


def test_no_words_overlap(tmp_path):
    names = []
    for study in learned.load(write(tmp_path, many())):
        for picture in learned_figures.drawn(study):
            figure = picture.figure
            plot.arrange(figure, picture.title, picture.footer)
            figure.canvas.draw()
            parts = [axes.get_tightbbox() for axes in figure.axes]
            parts += [text.get_window_extent() for text in figure.texts]
            parts += [legend.get_window_extent() for legend in figure.legends]
            for one, other in itertools.combinations(parts, 2):
                assert not one.padded(-1).overlaps(other), (picture.name, one, other)
            for part in parts:
                assert part.x0 >= -1, picture.name
                assert part.x1 <= figure.bbox.x1 + 1, picture.name
            names.append(picture.name)
            plt.close(figure)
    kinds = {"lengths", "pareto", "beyond", "rates", "steps", "by_pairs", "cost_pairs4"}
    assert kinds <= set(names)
