import json
import subprocess
import sys

import pytest

from harness import environment
from harness.environment import FINGERPRINT, code_hash, same_place


def test_same_place_needs_device_and_software():
    here = environment.environment("cpu")
    assert same_place(here, dict(here))
    for key in FINGERPRINT:
        assert not same_place(here, {**here, key: "other"})


def test_the_environment_is_complete():
    here = environment.environment("cpu")
    for key in ("device", "cores", "threads", "memory_gib", "torch", "python", "utc", "commit"):
        assert here[key], key
    assert here["device_type"] == "cpu"
    json.dumps(here, allow_nan=False)


def test_an_installed_copy_has_no_commit(tmp_path):
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *arguments], check=True)
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert environment._commit(inside) == {"commit": None, "dirty": None}


def test_each_architecture_has_a_hash_of_its_own():
    hashes = {a: code_hash(a) for a in ("transformer", "mamba2", "rwkv7", "hyena")}
    assert len(set(hashes.values())) == 4
    assert code_hash("mamba2") == hashes["mamba2"]
    assert code_hash("mamba2*3+hyena") not in hashes.values()


@pytest.mark.parametrize(
    ("kernels", "archs"),
    [
        ("ssd", {"mamba2"}),
        ("wkv7", {"rwkv7"}),
        ("short_conv", {"mamba2", "hyena"}),
        ("long_conv", {"hyena"}),
        ("long_conv_fft", {"hyena"}),  # which others of its kernels import
        ("long_conv_rows", {"hyena"}),
    ],
)
def test_the_hash_of_a_kernel_s_time_covers_the_kernels(kernels, archs, tmp_path, monkeypatch):
    def hashes():
        every = ("transformer", "mamba2", "rwkv7", "hyena")
        return {(a, b): code_hash(a, "ours", b) for a in every for b in ("torch", "triton")}

    before, real = hashes(), environment._source
    changed = tmp_path / "changed.py"
    changed.write_bytes(real(f"archs.ops.{kernels}_kernel").read_bytes() + b"\n")
    monkeypatch.setattr(
        environment, "_source", lambda m: changed if m == f"archs.ops.{kernels}_kernel" else real(m)
    )
    after = hashes()
    assert {what for what in before if before[what] != after[what]} == {
        (arch, "triton") for arch in archs
    }


PLUG_IN = """
from archs.mamba2 import Mamba2Block
from . import other
class Mine(Mamba2Block):
    def forward(self, x, state=None, carry=None):
        from mine.lazily import nothing
"""


@pytest.fixture
def hash_of(tmp_path, monkeypatch):
    """Hash of a plug-in's block, after writing `text` into one of its files, in a new process."""
    package = tmp_path / "mine"
    package.mkdir()
    for name in ("__init__", "other", "lazily", "unused"):
        (package / f"{name}.py").write_text("nothing = 1\n")
    (package / "block.py").write_text(PLUG_IN)

    def run(name=None, text=None):
        if name:
            (package / name).write_text(text)
        code = (
            "import archs; from mine.block import Mine; archs.ARCHITECTURES['mine'] = Mine;"
            "from harness.environment import code_hash; print(code_hash('mine'))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout

    return run


def test_the_hash_follows_what_a_plug_in_imports_and_nothing_else(hash_of):
    before = hash_of()
    assert hash_of("unused.py", "nothing = 2\n") == before
    changed = {hash_of(name, PLUG_IN * 2 if name == "block.py" else "nothing = 2\n")
               for name in ("block.py", "other.py", "lazily.py")}  # fmt: skip
    assert len({before, *changed}) == 4
