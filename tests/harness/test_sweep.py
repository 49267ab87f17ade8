import pytest

from harness import sweep
from harness.sweep import Grid

GRID = """
[[grid]]
level = "op"
phase = "forward"
archs = ["mamba2", "hyena"]
lengths = [256, 512]
size = "d64"

[[grid]]
level = "model"
phase = "decode"
archs = ["rwkv7"]
positions = [100]
"""


def written(tmp_path, text):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return path


def test_a_file_is_every_combination_once(tmp_path):
    cells = sweep.cells(sweep.load(written(tmp_path, GRID)))
    assert [(c.arch, c.level, c.phase, c.seq_len, c.position) for c in cells] == [
        ("mamba2", "op", "forward", 256, None),
        ("hyena", "op", "forward", 256, None),
        ("mamba2", "op", "forward", 512, None),
        ("hyena", "op", "forward", 512, None),
        ("rwkv7", "model", "decode", None, 100),
    ]
    assert len({c.key for c in cells}) == 5
    assert cells[0].size == "d64"


def test_overlapping_grids_name_a_cell_once():
    grid = Grid(level="op", phase="forward", lengths=(64,))
    assert len(sweep.cells([grid, grid])) == 4


def test_chosen_architectures_replace_those_of_the_grid():
    grid = Grid(level="op", phase="forward", lengths=(64, 128))
    cells = sweep.cells([grid], archs=["rwkv7"])
    assert [(c.arch, c.seq_len) for c in cells] == [("rwkv7", 64), ("rwkv7", 128)]
    (hybrid,) = sweep.cells(
        [Grid(level="model", phase="prefill", lengths=(64,))], archs=["mamba2+transformer"]
    )
    assert hybrid.arch == "mamba2+transformer"


def test_the_quick_preset_covers_what_it_promises():
    cells = sweep.cells(sweep.preset("quick"))
    for arch in ("transformer", "mamba2", "rwkv7", "hyena"):
        mine = [c for c in cells if c.arch == arch]
        op = [c.seq_len for c in mine if c.level == "op" and c.phase == "forward"]
        assert op == [256, 512, 1024, 2048, 4096, 8192, 16384]
        assert max(c.seq_len for c in mine if c.level == "block") <= 4096
        assert len([c for c in mine if c.phase == "decode"]) >= 4
        (loss,) = [c for c in mine if c.kind == "loss"]
        assert loss.options["steps"] == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"archs": ["mambda2"]}, "did you mean 'mamba2'"),
        ({"level": "block", "phase": "forwrad"}, "did you mean 'forward'"),
        ({"phase": "decode", "positions": [1]}, "level 'op' has no phase 'decode'"),
        ({"lengths": [0]}, ">= 1"),
        ({"lengths": [2.5]}, ">= 1"),
        ({"batch": 0}, ">= 1"),
        ({"lengths": []}, "no cells"),
        ({"size": "big"}, "write d256"),
        ({"dtype": "float23"}, "did you mean 'float32'"),
        ({"backend": "trition"}, "did you mean 'triton'"),
        ({"archs": ["mamba2*+hyena"]}, "cannot read the pattern"),
    ],
)
def test_bad_cells_are_refused_before_any_runs(change, message):
    grid = Grid(**{"level": "op", "phase": "forward", "lengths": [64], **change})
    with pytest.raises(ValueError, match=message):
        sweep.cells([grid])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[grid]]\nlevle = 'op'", "did you mean 'level'"),
        ("[[grids]]\nlevel = 'op'", "did you mean 'grid'"),
        ("[[grid]]\nlevel = 'op'", "phase"),
        ("not toml", "not a TOML file"),
        ("", r"no \[\[grid\]\] table"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"sweep.toml: .*{message}"):
        sweep.load(written(tmp_path, text))


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        sweep.preset("quik")
