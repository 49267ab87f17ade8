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


def test_flags_narrow_and_replace():
    grids = [
        Grid(level=["op", "block"], phase=["forward", "backward"], lengths=(64, 128), tokens=128),
        Grid(level="model", phase="decode", positions=(5, 6)),
    ]

    def some(**flags):
        return [
            (c.arch, c.level, c.phase, c.seq_len or c.position, c.batch)
            for c in sweep.cells(sweep.narrowed(grids, **flags))
        ]

    assert some(level=["op"], phase=["backward"], archs=["rwkv7"]) == [
        ("rwkv7", "op", "backward", 64, 2),
        ("rwkv7", "op", "backward", 128, 1),
    ]
    assert some(phase=["decode"], archs=["mamba2+transformer"], positions=[9]) == [
        ("mamba2+transformer", "model", "decode", 9, 1)
    ]
    assert some(level=["op"], phase=["forward"], archs=["hyena"], lengths=[32], batch=3) == [
        ("hyena", "op", "forward", 32, 3)
    ]
    assert some(level=["op"], phase=["forward"], archs=["hyena"], tokens=256)[0][-1] == 4
    with pytest.raises(ValueError, match="did you mean 'block'"):
        some(level=["blok"])
    with pytest.raises(ValueError, match="no phase prefill"):
        some(phase=["prefill"])
    with pytest.raises(ValueError, match="positions are for phase decode"):
        some(level=["op"], positions=[5])
    with pytest.raises(ValueError, match="give positions instead"):
        some(phase=["decode"], lengths=[5])


def test_lists_are_every_combination():
    grid = Grid(
        level="op",
        phase=["forward", "backward"],
        archs="mamba2",
        lengths=64,
        size=["d64", "d128"],
        dtype=["float32", "bfloat16"],
        backend=["torch", "reference"],
        replicates=3,
    )
    cells = sweep.cells([grid])
    assert len(cells) == 2 * 2 * 2 * 2 * 3
    assert [c.replicate for c in cells] == [0] * 16 + [1] * 16 + [2] * 16


def test_a_token_budget_gives_the_batch():
    grid = Grid(level="op", phase="forward", archs="mamba2", lengths=(64, 256), tokens=512)
    assert [c.batch for c in sweep.cells([grid])] == [8, 2]


def test_types_and_backends_are_resolved_when_the_cells_are_made():
    grid = Grid(level="op", phase="forward", archs="mamba2", lengths=64)
    (on_cpu,), (on_gpu,) = sweep.cells([grid], "cpu"), sweep.cells([grid], "cuda")
    assert (on_cpu.dtype, on_cpu.backend) == ("float32", "torch")
    assert (on_gpu.dtype, on_gpu.backend) == ("bfloat16", "triton")
    quick = sweep.cells(sweep.preset("quick"), "cuda")  # what make demo measures
    assert {(c.arch, c.backend) for c in quick} == {(arch, "triton") for arch in sweep.ARCHS}


def test_a_sweep_is_a_preset_a_file_grids_or_cells(tmp_path):
    path = written(tmp_path, GRID)
    from_file = sweep.as_cells(path, "cpu")
    assert sweep.as_cells(str(path), "cpu") == from_file
    assert sweep.as_cells(sweep.load(path), "cpu") == from_file
    assert sweep.as_cells(from_file, "cpu") == from_file
    assert sweep.as_cells("quick", "cpu") == sweep.cells(sweep.preset("quick"))


@pytest.mark.parametrize("name", list(sweep.PRESETS))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_preset_makes_cells(name, device):
    assert sweep.cells(sweep.preset(name), device)


def test_the_quick_preset_covers_what_it_promises():
    cells = sweep.cells(sweep.preset("quick"))
    for arch in ("transformer", "mamba2", "rwkv7", "hyena"):
        mine = [c for c in cells if c.arch == arch]
        op = [c for c in mine if c.level == "op" and c.phase == "forward"]
        for replicate in range(3):
            lengths = [c.seq_len for c in op if c.replicate == replicate]
            assert lengths == [256, 512, 1024, 2048, 4096, 8192, 16384]
        assert len({c.seq_len for c in mine if c.level == "block"}) >= 4  # enough for a fit
        assert len([c for c in mine if c.phase == "decode"]) >= 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"archs": ["mambda2"]}, "did you mean 'mamba2'"),
        ({"level": "block", "phase": "forwrad"}, "did you mean 'forward'"),
        ({"phase": "train_step"}, "level 'op' has no phase 'train_step'"),
        ({"archs": ["mamba2+hyena"]}, "measured at level model"),
        ({"size": "d100"}, "transformer at size d100: width must be a multiple of head_dim"),
        ({"tokens": 100}, "not a multiple of length 64"),
        ({"tokens": 64, "batch": 1}, "not both"),
        ({"replicates": 0}, "replicates must be a whole number >= 1"),
        ({"lengths": "64"}, "lengths must be whole numbers >= 1, got '64'"),
        ({"lengths": [True]}, ">= 1, got True"),
        ({"lengths": [-5]}, ">= 1, got -5"),
        ({"archs": 3}, "archs must be a name or a list of names"),
        ({"batch": 1.5}, "batch must be a whole number"),
        ({"options": 1}, "options must be a table"),
        ({"options": {"a": float("nan")}}, "finite numbers"),
        ({"archs": ["mamba2*99999999999999999999"]}, "more than 4096 blocks"),
        ({"size": "d64000000000000000000"}, "no width above"),
        ({"size": "0M"}, "matched sizes begin at"),
        ({"level": "model", "size": "5M", "archs": "mamba2+hyena"}, "give a width"),
        ({"replicates": 10**9}, "replicates must be"),
        ({"seed": 1 << 64}, "seed must be"),
        ({"batch": 1 << 63}, "batch must be"),
        ({"lengths": [0]}, ">= 1"),
        ({"lengths": [2.5]}, ">= 1"),
        ({"batch": 0}, ">= 1"),
        ({"lengths": []}, "no cells"),
        ({"size": "big"}, "write d256"),
        ({"size": "d64h128"}, "transformer at size d64h128: width must be a multiple of head_dim"),
        ({"size": "d64h32", "archs": "hyena"}, "hyena has no heads: give a width alone, as d256"),
        ({"level": "model", "size": "d64h32", "archs": "mamba2+rwkv7"}, "heads of several kinds"),
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
        ("[[grid]]\nlevel = 'op'", "grid 1: no phase: one of forward"),
        ("grid = 3", r"no \[\[grid\]\] table"),
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


def test_binary_files_are_refused(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        sweep.load(path)


@pytest.mark.parametrize("arch", sweep.ARCHS)
def test_sizes_with_heads_are_of_the_architectures_that_their_grid_names(arch):
    grids = sweep.narrowed(sweep.preset("h100-ops"), archs=[arch])
    sizes = {"d2048", "d2048h128"} if arch == "transformer" else {"d2048"}
    assert {(c.arch, c.size) for c in sweep.cells(grids)} == {(arch, size) for size in sizes}
    both = sweep.cells(sweep.narrowed(sweep.preset("h100-ops"), archs=[arch, "transformer"]))
    assert {(c.arch, c.size) for c in both} == {
        (arch, "d2048"), ("transformer", "d2048"), ("transformer", "d2048h128"),
    }  # fmt: skip
    grid = Grid(level="op", phase="forward", archs="transformer", lengths=64, size="d64h32")
    if arch != "transformer":
        with pytest.raises(ValueError, match="give a size too"):
            sweep.narrowed([grid], archs=[arch])
    assert [c.size for c in sweep.cells(sweep.narrowed([grid], archs=[arch], size="d64"))] == [
        "d64"
    ]


def test_a_pattern_is_one_cell_however_it_is_written():
    grid = Grid(
        level="model", phase="prefill", lengths=64,
        archs=["mamba2*2+hyena", " mamba2 + mamba2+hyena*1", "mamba2*1"],
    )  # fmt: skip
    assert [c.arch for c in sweep.cells([grid])] == ["mamba2*2+hyena", "mamba2"]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert sweep.resolve_device("auto") == "cpu"
    with pytest.raises(ValueError, match="seqscale doctor"):
        sweep.resolve_device("cuda")
    with pytest.raises(ValueError, match="did you mean 'cuda'"):
        sweep.resolve_device("cud")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert sweep.resolve_device("auto") == "cuda"
