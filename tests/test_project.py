"""What the README and the layout promise."""

import ast
import re
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
