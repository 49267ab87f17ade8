import itertools
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from harness import curves, figures, plot
from runs import write_curve
from training_runs import loss_run, recall_run, write

ARCHS = ("transformer", "mamba2", "rwkv7", "hyena")
LAWS = {
    "transformer": lambda n: 1e-6 * n**2,
    "mamba2": lambda n: 0.002 * n,
    "rwkv7": lambda n: 0.005 * n,
    "hyena": lambda n: 0.0003 * n,
}
GROWTH = ["time", "exponent", "memory"]


def fill(out, **options):
    """A run directory with a figure of each kind."""
    for arch in ARCHS:
        write_curve(out, arch, LAWS[arch], **options)
        write_curve(out, arch, LAWS[arch], level="model", phase="decode", **options)
    write(out, [loss_run(arch) for arch in ARCHS])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    fill(out)
    return {path.name: path for path in plot.draw(out).paths}


def text_of(svg):
    return re.sub(r"\s+", " ", " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())))


def test_there_is_a_figure_of_each_kind_as_svg_and_png(drawn):
    names = [f"op_forward_d256_float32_torch_B1_{kind}" for kind in GROWTH]
    names += ["model_decode_d256_float32_torch_B1"]
    names += [f"loss_300K_{kind}" for kind in ("lengths", "pareto", "steps")]
    files = [f"{name}.{kind}" for name in names for kind in ("svg", "png")]
    assert list(drawn) == [*files, "summary.md", "learned.md"]
    assert all(p.stat().st_size > 10_000 for p in drawn.values() if p.suffix == ".png")


def test_every_figure_names_architectures_device_versions_and_commit(drawn):
    for path in drawn.values():
        if path.suffix == ".svg":
            text = text_of(path)
            for word in ("Transformer", "Mamba-2", "RWKV-7", "Hyena"):
                assert word in text, (path.name, word)
            assert "a CPU, 2 threads · torch 2 · Python 3 · commit abcdef0123" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "op_forward_d256_float32_torch_B1_time",
            [
                *("n log n", "n²", "4,096", "time a sequence, ms", "time a token, µs"),
                *("sequence length T, tokens", "Transformer: tail 2.0", "of 3 processes", "Rings"),
            ],
        ),
        ("op_forward_d256_float32_torch_B1_exponent", ["local exponent", "counted FLOPs", "95 %"]),
        ("op_forward_d256_float32_torch_B1_memory", ["peak memory of the batch, MiB"]),
        (
            "model_decode_d256_float32_torch_B1",
            ["time a token, ms", "state a sequence, MiB", "position, tokens already read"],
        ),
        ("loss_300K_steps", ["300K parameters", "training loss, bits a byte", "training step"]),
        ("loss_300K_lengths", ["bigram entropy", "position in a context of T = 64 tokens"]),
    ],
)
def test_axes_have_units_and_marks_are_explained(drawn, name, words):
    text = text_of(drawn[f"{name}.svg"])
    assert [word for word in words if word not in text] == []


def test_crossovers_are_marked_with_their_length(drawn):
    text = text_of(drawn["op_forward_d256_float32_torch_B1_time.svg"]).replace(",", "")
    near = [n for n in map(int, re.findall(r"\d+", text)) if 1900 < n < 2040]
    assert len(near) == 1  # the Transformer and Mamba-2 cross at 2,000


def test_the_summary_is_beside_the_figures(drawn):
    assert "| Transformer | n² | n² | 2.0" in drawn["summary.md"].read_text()
    assert "| Transformer | 64 | 300,000 | 2.000" in drawn["learned.md"].read_text()


def test_a_run_of_training_alone_is_drawn(tmp_path):
    larger = loss_run("hyena", size="1M", metrics={"params": 1_000_000})
    write(tmp_path, [loss_run(), larger, recall_run()])
    names = [path.name for path in plot.draw(tmp_path).paths]
    assert names[-1] == "learned.md"
    assert "summary.md" not in names
    assert [name for name in names if name.endswith("steps.svg")] == [
        "loss_300K_steps.svg",
        "loss_1M_steps.svg",
    ]


def test_files_of_alike_studies_have_different_names(tmp_path):
    corpora = ["files:a/b.txt", "files:ab.txt", "files:" + "x" * 300]
    write(tmp_path, [loss_run(options={"corpus": corpus}) for corpus in corpora])
    names = [path.name for path in plot.draw(tmp_path).paths if path.name.endswith("steps.svg")]
    assert len(set(names)) == 3
    assert max(map(len, names)) < 100


def test_files_of_tasks_are_named_by_whole_numbers_of_steps(tmp_path):
    runs = [
        recall_run(length=n, options={"steps": steps}) for n in (32, 64) for steps in (800, 1000)
    ]
    write(tmp_path, [loss_run(), *runs])
    names = [p.name for p in plot.draw(tmp_path).paths if p.name.startswith("recall")]
    assert {name.partition("_by")[0] for name in names} == {"recall_mqar_800", "recall_mqar_1000"}


def test_the_committed_records_of_before_are_drawn(tmp_path):
    drawn = plot.draw(Path(__file__).parents[2] / "results/cpu-2core/quick.jsonl", tmp_path)
    names = [path.name for path in drawn.paths]
    assert {"loss_1M_pareto.svg", "loss_1M_steps.svg", "learned.md"} <= set(names)


def test_the_svg_is_the_same_for_the_same_records(tmp_path):
    fill(tmp_path, processes=1)
    first = {p: p.read_bytes() for p in plot.draw(tmp_path).paths if p.suffix != ".png"}
    second = {p: p.read_bytes() for p in plot.draw(tmp_path).paths if p.suffix != ".png"}
    assert first == second


def test_a_length_without_a_value_is_drawn_where_the_curve_ends(tmp_path):
    fill(tmp_path, processes=1, failed={16384: "oom", 8192: "timeout"})
    text = text_of(plot.draw(tmp_path).paths[0])
    for name in ("Transformer", "Mamba-2", "RWKV-7", "Hyena"):
        assert f"{name}: timeout" in text
    assert "16,384" in text  # it stands on the axis all the same


def test_no_words_overlap(tmp_path):
    fill(tmp_path)
    with plt.rc_context(figures.SETTINGS):
        for comparison in curves.load(tmp_path):
            for kind in (figures.time, figures.exponent, figures.memory, figures.decode):
                if (kind is figures.decode) != (comparison.along == "position"):
                    continue
                figure = kind(comparison)
                plot.arrange(figure, "A title", "A line.\nAnother.")
                figure.canvas.draw()
                axes = [a.get_tightbbox() for a in figure.axes]
                parts = [*axes, *(t.get_window_extent() for t in figure.texts)]
                parts += [legend.get_window_extent() for legend in figure.legends]
                for one, other in itertools.combinations(parts, 2):
                    assert not one.padded(-1).overlaps(other), (kind.__name__, one, other)
                for part in parts:
                    assert part.x0 >= -1
                    assert part.x1 <= figure.bbox.x1 + 1
                plt.close(figure)


def test_blocks_from_elsewhere_differ_from_each_other_too(tmp_path):
    for arch in ("transformer", "mine", "yours"):
        write_curve(tmp_path, arch, LAWS["mamba2"], processes=1)
    (comparison,) = curves.load(tmp_path)
    figure = figures.time(comparison)
    lines = [bars.lines[0] for bars in figure.axes[0].containers]
    looks = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(looks) == 3
    plt.close(figure)


def test_disturbed_cells_are_hollow(tmp_path):
    write_curve(tmp_path, "mamba2", LAWS["mamba2"], processes=1)
    path = sorted((tmp_path / "records").glob("*.json"))[0]
    path.write_text(path.read_text().replace('"foreign_load": 0.0', '"foreign_load": 0.9'))
    (comparison,) = curves.load(tmp_path)
    assert comparison.curves[0].cells["disturbed"].sum() == 1
    figure = figures.time(comparison)
    hollow = [x for x in figure.axes[0].lines if x.get_markerfacecolor() == "white"]
    assert [len(line.get_xdata()) for line in hollow] == [1]
    plt.close(figure)
    assert "Hollow" in text_of(plot.draw(tmp_path).paths[0])


def test_a_run_without_a_finished_cell_says_so(tmp_path):
    write_curve(tmp_path, "hyena", LAWS["hyena"], lengths=(8,), failed={8: "oom"})
    with pytest.raises(plot.NothingToDrawError, match="no finished cell"):
        plot.draw(tmp_path)


def test_a_token_budget_is_one_set_of_axes_and_two_batches_are_two(tmp_path):
    def names(out):
        paths = plot.draw(out).paths
        return [p.stem for p in paths if p.stem.endswith("_time") and p.suffix == ".svg"]

    write_curve(tmp_path / "a", "hyena", LAWS["hyena"], lengths=(8, 16, 32), tokens=32)
    assert names(tmp_path / "a") == ["op_forward_d256_float32_torch_BT32_time"]
    for batch in (1, 4):
        write_curve(tmp_path / "b", "hyena", LAWS["hyena"], lengths=(8, 16), batch=batch)
    assert names(tmp_path / "b") == [
        "op_forward_d256_float32_torch_B1_time",
        "op_forward_d256_float32_torch_B4_time",
    ]


def test_one_length_is_drawn_too(tmp_path):
    write_curve(tmp_path, "hyena", LAWS["hyena"], lengths=(64,), processes=1)
    assert len(plot.draw(tmp_path).paths) == 7


def test_nothing_to_draw_says_what_to_run(tmp_path):
    with pytest.raises(plot.NothingToDrawError, match="run seqscale cost"):
        plot.draw(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_an_export_that_does_not_load_again_says_what_does(tmp_path, suffix):
    path = tmp_path / f"cells{suffix}"
    path.write_text("a,b")
    with pytest.raises(plot.NothingToDrawError, match="a run directory, or a"):
        plot.draw(path)
