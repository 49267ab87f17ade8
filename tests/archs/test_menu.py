import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

import archs
from archs.block import Block
from archs.model import expand_pattern
from archs.ops import BACKENDS

SMALL = {"width": 64, "vocab_size": 32, "max_len": 64}


@pytest.fixture
def plug_ins(monkeypatch):
    """Install entry points for one test."""

    def install(*entries):
        monkeypatch.setattr(archs, "entry_points", lambda group: entries)
        archs.architectures.cache_clear()

    yield install
    archs.architectures.cache_clear()


@pytest.mark.parametrize(
    ("pattern", "depth", "expected"),
    [
        ("mamba2", None, ["mamba2"]),
        ("mamba2", 3, ["mamba2"] * 3),
        ("mamba2*3+transformer", None, ["mamba2"] * 3 + ["transformer"]),
        ("mamba2 * 2 + hyena", 6, ["mamba2", "mamba2", "hyena"] * 2),
    ],
)
def test_patterns_expand(pattern, depth, expected):
    assert expand_pattern(pattern, depth) == expected


@pytest.mark.parametrize("pattern", ["", "+", "mamba2*", "mamba2*0", "mamba2++hyena", "*3", "a b"])
def test_malformed_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="cannot read the pattern"):
        expand_pattern(pattern)


@pytest.mark.parametrize("depth", [0, 3, 5])
def test_a_depth_that_does_not_fit_is_refused(depth):
    with pytest.raises(ValueError, match="not a multiple"):
        expand_pattern("mamba2+hyena", depth)


@pytest.mark.parametrize(
    ("name", "message"),
    [("mamba", "did you mean 'mamba2'"), ("lstm", "expected one of transformer, mamba2")],
)
def test_unknown_architectures_name_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        archs.build_block(name, width=64)


def test_unused_options_are_refused():
    with pytest.raises(ValueError, match="options for hyena"):
        archs.build_model("mamba2", options={"hyena": {"order": 3}}, **SMALL)


def test_auto_is_resolved_when_the_model_is_built():
    model = archs.build_model("mamba2+hyena", **SMALL)
    assert [block.backend for block in model.blocks] == ["torch", "torch"]
    assert archs.build_block("rwkv7", width=64, backend="reference").backend == "reference"
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        archs.build_block("rwkv7", width=64, backend="cuda")


@pytest.mark.parametrize("name", archs.ARCHITECTURES)
def test_parameters_are_counted_once(name):
    model = archs.build_model(name, depth=2, **SMALL)
    assert model.parameter_count() == sum(p.numel() for p in model.state_dict().values())
    tied = archs.build_model(name, depth=2, tie_embeddings=True, **SMALL)
    assert tied.parameter_count() == model.parameter_count() - 32 * 64


def test_hybrid_blocks_know_their_place():
    model = archs.build_model("rwkv7+mamba2", depth=4, **SMALL)
    places = [(b.layer_index, b.kind_index, b.depth) for b in model.blocks]
    assert places == [(0, 0, 4), (1, 0, 4), (2, 1, 4), (3, 1, 4)]


def test_a_place_outside_the_stack_is_refused():
    with pytest.raises(ValueError, match="outside a stack"):
        archs.build_block("mamba2", width=64, layer_index=2, depth=2)


def test_a_plug_in_is_on_the_menu(plug_ins):
    plug_ins(EntryPoint("mine", "archs.mamba2:Mamba2Block", "seqscale.blocks"))
    assert "mine" in archs.architectures()
    assert isinstance(archs.build_block("mine", width=64), Block)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("broken", "no_such_module:Block"),
        ("exits", "sys:exit"),
        ("hyena", "archs.mamba2:Mamba2Block"),
        ("not_a_block", "torch.nn:Linear"),
    ],
)
def test_a_bad_plug_in_is_one_warning(plug_ins, name, value):
    plug_ins(EntryPoint(name, value, "seqscale.blocks"))
    with pytest.warns(UserWarning, match=f"plug-in {name!r} of an unknown package ignored"):
        menu = archs.architectures()
    assert menu == archs.ARCHITECTURES


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    ).stdout


def test_import_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import archs; print(list(archs.ARCHITECTURES))"
    )
    assert "hyena" in run(code)


def test_archs_imports_nothing_but_torch():
    """Beyond what torch brings, `archs` loads the standard library and itself."""
    code = (
        "import sys, torch; before = set(sys.modules); import archs;"
        "names = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(*sorted(names - set(sys.stdlib_module_names) - {'torch', 'archs'}))"
    )
    assert run(code).split() == []


def test_import_is_quick():
    code = (
        "import torch, time; start = time.perf_counter(); import archs;"
        "print(time.perf_counter() - start)"
    )
    assert min(float(run(code)) for _ in range(3)) < 0.2


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_has_a_name(backend):
    assert archs.resolve_backend(backend, "hyena") == backend


ALL = "+".join(archs.ARCHITECTURES)


@pytest.mark.parametrize("there", [True, False])
def test_auto_is_triton_on_a_gpu(monkeypatch, there):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    found = "triton" if there else "torch"
    for pattern in (ALL, *archs.ARCHITECTURES):
        assert archs.resolve_backend("auto", pattern) == found
        assert archs.resolve_backend("auto", pattern, "cuda:0") == "triton"
        assert archs.resolve_backend("auto", pattern, "cpu") == "torch"
    assert {block.backend for block in archs.build_model(ALL, width=64).blocks} == {found}
    assert archs.build_block("hyena", width=64).backend == found


def test_auto_is_torch_where_there_are_no_kernels(monkeypatch):
    class Bare(archs.ARCHITECTURES["mamba2"]):
        has_kernels = False

    menu = {**archs.ARCHITECTURES, "bare": Bare}
    with monkeypatch.context() as patch:
        patch.setattr(archs, "architectures", lambda: menu)
        patch.setattr("torch.cuda.is_available", lambda: True)
        assert archs.resolve_backend("auto", "bare") == "torch"
        model = archs.build_model("bare+mamba2", width=64)
        assert [block.backend for block in model.blocks] == ["torch", "torch"]
    monkeypatch.setattr(archs, "find_spec", lambda name: None)
    assert archs.resolve_backend("auto", "mamba2", "cuda") == "torch"
