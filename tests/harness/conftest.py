import importlib
import os
import signal
import sys
from pathlib import Path

import pytest

import archs
import guarded
from harness import __main__ as command_line
from harness import run

CEILINGS = {"copy_bytes_per_s": 1e15, "matmul_flops_per_s_float32": 1e15, "exp2_per_s": 1e15}
FAULTY = {
    "segfault": "Segfault",
    "abort": "Abort",
    "hang": "Hang",
    "hungry": "Hungry",
    "hungry-python": "HungryInPython",
    "hungry-cpp": "HungryInCpp",
    "wrong": "Wrong",
    "exit": "Exit",
    "killed": "Killed",
    "raises": "Raises",
    "too-large": "TooLarge",
    "chatty": "Chatty",
}


@pytest.fixture(scope="session")
def faulty_package(tmp_path_factory):
    """A folder that, on the path, is an installed package of blocks that break."""
    root = tmp_path_factory.mktemp("site")
    source = Path(__file__).parent / "plugins" / "faulty_blocks.py"
    (root / source.name).write_text(source.read_text())
    info = root / "faulty_blocks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-blocks\nVersion: 1.0\n")
    lines = [f"{name} = faulty_blocks:{block}" for name, block in FAULTY.items()]
    (info / "entry_points.txt").write_text("[seqscale.blocks]\n" + "\n".join(lines) + "\n")
    return root


@pytest.fixture
def faulty(faulty_package, monkeypatch):
    """The blocks that break, on this process's menu and in its workers'."""
    monkeypatch.syspath_prepend(str(faulty_package))
    importlib.invalidate_caches()
    archs.architectures.cache_clear()
    yield
    archs.architectures.cache_clear()
    sys.modules.pop("faulty_blocks", None)


@pytest.fixture
def faulty_environment(faulty_package):
    """Variables for a command line that finds the blocks that break."""
    path = os.pathsep.join(filter(None, [str(faulty_package), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


@pytest.fixture
def here(tmp_path, monkeypatch, capfd):
    """The command line in this process and an empty folder: exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.Launcher, "measure_ceilings", lambda self, dtypes: CEILINGS)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["seqscale", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            command_line.main()
        return exit_.value.code, *capfd.readouterr()

    return call


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a file of guards; the working directory."""
    root = tmp_path / "mine"
    (root / "src").mkdir(parents=True)
    (root / "src" / "mine.py").write_text(guarded.FAST)
    (root / "guards.py").write_text(guarded.GUARDS)
    guarded.git(root.parent, "init", "-q", str(root))
    guarded.commit(root, "fast")
    monkeypatch.chdir(root)
    return root
