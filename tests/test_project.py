"""What the README and the layout promise."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [p for folder in ("archs", "harness") for p in (ROOT / folder).rglob("*.py")]


def tree_in_readme():
    """Paths named in the README's tree: a folder's line ends with a slash, its files follow."""
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"## The tree\n+```\n(.*?)```", readme, flags=re.DOTALL)
    folders: list[str] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in line.split("  #")[0].split():
            folders[depth:] = [name]
            yield "".join(f for f in folders[:depth] if f.endswith("/")) + name


def test_the_readme_tree_is_true():
    named = set(tree_in_readme())
    for path in named:
        assert (ROOT / path).exists(), path
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        assert name in named or path.name == "__init__.py", f"{name} is not in the README's tree"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "archs").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_archs_never_imports_the_harness(path):
    names = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not {n for n in names if n and n.split(".")[0] == "harness"}


def test_constraints_pin_every_dependency():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(name for extra in extras for name in extra)]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for requirement in wanted:
        name = re.match(r"[\w-]+", requirement)[0].lower()
        assert name in pinned, name


def python_in_readme(mark):
    """The one Python block of the README that holds `mark`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if mark in block]
    return block


def test_the_block_in_the_readme_obeys_the_contract():
    import torch

    names = {"__name__": "average"}
    exec(compile(python_in_readme("class AverageBlock"), "README.md", "exec"), names)
    torch.manual_seed(0)
    block = names["AverageBlock"](names["BlockConfig"](width=8)).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    state = block.init_state(2, 11, device="cpu", dtype=torch.float64)
    folded = []
    for token in x.unbind(1):
        y, state, _ = block.step(token, state)
        folded.append(y)
    assert torch.allclose(block(x).x, torch.stack(folded, 1), rtol=1e-12)
    assert state.position == 11
    assert not torch.allclose(block(x).x, x)


def test_the_fits_in_the_readme_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(python_in_readme("fit.classify"), "README.md", "exec"), {})
    said = capsys.readouterr().out
    for word in ("tail_high", "verdict", "transformer", "Exponent(value="):
        assert word in said


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("cuda_build", [True, False])
def test_make_brings_the_cuda_build_where_there_is_a_gpu(tmp_path, gpu, cuda_build):
    def script(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    said = "GPU 0: a GPU (UUID: 1)" if gpu else "NVIDIA-SMI has failed because it found no GPU"
    script(tmp_path / "fake" / "nvidia-smi", f'echo "{said}"')
    log = tmp_path / "log"
    script(
        tmp_path / "venv" / "bin" / "python",
        f'case "$*" in *torch.version.cuda*) exit {int(not cuda_build)};; esac; echo "$*" >> {log}',
    )
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "venv" / "created").touch()
    subprocess.run(
        ["make", "VENV=venv", "venv/installed"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path / 'fake'}:{os.environ['PATH']}", "MAKEFLAGS": ""},
        check=True,
    )
    first, *rest = log.read_text().splitlines()
    assert first.endswith("--editable .")
    assert len(rest) == int(gpu and not cuda_build)
    assert all("--isolated install" in line and line.endswith(" torch") for line in rest)
