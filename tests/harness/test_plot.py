import pytest

from harness import plot
from harness.record import Case, Measurement, RunDirectory

ENVIRONMENT = {
    "device": "a CPU",
    "threads": 2,
    "torch": "2",
    "python": "3",
    "commit": "abcdef0123456",
}
ARCHS = ("transformer", "mamba2", "rwkv7", "hyena")


def fill(out, statuses=("ok",)):
    """A small run directory with one figure of each kind."""
    directory = RunDirectory(out)
    for i, arch in enumerate(ARCHS):
        for j, n in enumerate((256, 1024, 4096)):
            for level, phase in (("op", "forward"), ("model", "decode")):
                place = (None, n) if phase == "decode" else (n, None)
                time = (i + 1) * n / 1e3
                status = statuses[j % len(statuses)]
                metrics = {
                    "time_ms_p20": 0.9 * time,
                    "time_ms_p50": time,
                    "time_ms_p80": 1.2 * time,
                    "peak_bytes": n * 1024,
                    "state_bytes": 2**20,
                }
                case = Case(
                    kind="cost",
                    arch=arch,
                    level=level,
                    phase=phase,
                    batch=1,
                    seq_len=place[0],
                    position=place[1],
                    size="d256",
                )
                directory.write(
                    Measurement(
                        case=case,
                        status=status,
                        environment=ENVIRONMENT,
                        metrics=metrics if status == "ok" else {},
                    ),
                )
        case = Case(
            kind="loss",
            arch=arch,
            level="model",
            phase="train_step",
            batch=8,
            seq_len=64,
            size="1M",
        )
        directory.write(
            Measurement(
                case=case,
                status="ok",
                environment=ENVIRONMENT,
                metrics={"params": 1_000_000 + i},
                samples={"train_loss_bits_per_byte": [8.0, 7.0, 6.5 - i]},
            ),
        )
    directory.close()


def test_every_figure_is_drawn_with_its_words(tmp_path):
    fill(tmp_path)
    paths = plot.draw(tmp_path)
    assert [p.name for p in paths if p.suffix == ".svg"] == [
        "op_forward_d256_float32_torch_B1.svg",
        "model_decode_d256_float32_torch_B1.svg",
        "training_loss.svg",
    ]
    assert all(p.stat().st_size > 10_000 for p in paths if p.suffix == ".png")
    for path in paths:
        if path.suffix == ".svg":
            text = path.read_text()
            for word in ("Transformer", "Mamba-2", "RWKV-7", "Hyena", "a CPU", "commit abcdef0123"):
                assert word in text, (path.name, word)
    growth = (tmp_path / "figures" / "op_forward_d256_float32_torch_B1.svg").read_text()
    for word in ("n log n", "n²", "4,096", "time a sequence, ms", "medians"):
        assert word in growth


def test_the_svg_is_the_same_for_the_same_records(tmp_path):
    fill(tmp_path)
    first = {p: p.read_bytes() for p in plot.draw(tmp_path) if p.suffix == ".svg"}
    second = {p: p.read_bytes() for p in plot.draw(tmp_path) if p.suffix == ".svg"}
    assert first == second


def test_failed_cells_do_not_stop_a_figure(tmp_path):
    fill(tmp_path, statuses=("ok", "ok", "oom"))
    assert len(plot.draw(tmp_path)) == 6


def test_a_run_without_a_finished_cell_says_so(tmp_path):
    case = Case(
        kind="cost", arch="hyena", level="op", phase="forward", batch=1, seq_len=8, size="d64"
    )
    with RunDirectory(tmp_path) as directory:
        directory.write(Measurement(case=case, status="oom", environment=ENVIRONMENT))
    with pytest.raises(plot.NothingToDrawError, match="no finished cell"):
        plot.draw(tmp_path)


def test_a_token_budget_is_one_figure_and_two_batches_are_two(tmp_path):
    def drawn(out, batches):
        with RunDirectory(out) as directory:
            for seq_len, batch in batches:
                case = Case(kind="cost", arch="hyena", level="op", phase="forward", batch=batch,
                            seq_len=seq_len, size="d64")  # fmt: skip
                times = dict.fromkeys(("time_ms_p20", "time_ms_p50", "time_ms_p80"), 2.0 * batch)
                metrics = {**times, "peak_bytes": 1, "state_bytes": 1}
                directory.write(
                    Measurement(case=case, status="ok", environment=ENVIRONMENT, metrics=metrics)
                )
        return [p.stem for p in plot.draw(out) if p.suffix == ".svg"]

    assert drawn(tmp_path / "a", [(8, 4), (16, 2), (32, 1)]) == [
        "op_forward_d64_float32_torch_BT32"
    ]
    assert drawn(tmp_path / "b", [(8, 4), (16, 4), (8, 1), (16, 1)]) == [
        "op_forward_d64_float32_torch_B1", "op_forward_d64_float32_torch_B4"]  # fmt: skip


def test_nothing_to_draw_says_what_to_run(tmp_path):
    with pytest.raises(plot.NothingToDrawError, match="run seqscale cost"):
        plot.draw(tmp_path)
