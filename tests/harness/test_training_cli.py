"""`seqscale loss`, `recall` and `prepare`."""

import errno
import json

import pytest

from harness.record import RunDirectory

TEXT = "the quick brown fox jumps over the lazy dog, and so on and on.\n" * 400
LOSS = """
[[grid]]
archs = ["hyena", "mamba2"]
lengths = [32, 64]
size = "d32h16"
batch = 4
tokens = 1024
corpus = "files:texts/*.txt"
validation_tokens = 512
validation_block = 64
evaluate_at = 64
"""
RECALL = """
[[grid]]
tasks = "parity"
archs = "mamba2"
lengths = 16
evaluate_at = 32
size = "d32h16"
batch = 8
steps = 6
"""


@pytest.fixture
def folder(tmp_path, here):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text(TEXT[number:])
    (tmp_path / "loss.toml").write_text(LOSS.replace('"hyena", "mamba2"', '"mamba2"'))
    (tmp_path / "recall.toml").write_text(RECALL)
    return tmp_path


def test_losses_are_measured_shown_and_resumed(folder, here):
    code, _, err = here("loss", "loss.toml")
    assert code == 0, err
    assert "bits a byte" in err
    records = sorted((folder / "runs/loss/records").iterdir())
    found = [json.loads(path.read_text()) for path in records]
    assert sorted(r["case"]["seq_len"] for r in found) == [32, 64]
    for record in found:
        assert record["status"] == "ok", record["reason"]
        assert record["metrics"]["tokens"] == 1024
        assert 0 < record["metrics"]["val_loss_bits_per_byte"] < 10
        assert record["samples"]["evaluated_at"] == sorted({record["case"]["seq_len"], 64})
    assert not list((folder / "runs/loss/checkpoints").glob("*"))
    _, out, err = here("loss", "loss.toml", "--json")
    assert "2 of 2 cells were there already" in err
    assert json.loads(out)["statuses"] == {"ok": 2}
    assert sorted((folder / "runs/loss/records").iterdir()) == records


def test_a_checkpoint_stays_until_the_record_is_there(folder, here, monkeypatch):
    def full(self, measurement):
        raise OSError(errno.ENOSPC, "No space left on device", "runs")

    command = ("loss", "loss.toml", "--length", "32", "--checkpoint-every", "0")
    kept = folder / "runs/loss/checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write", full)
        assert here(*command)[0] == 5
    assert len(list(kept.iterdir())) == 1
    assert here(*command)[0] == 0
    (path,) = (folder / "runs/loss/records").iterdir()
    assert json.loads(path.read_text())["samples"]["resumed_at_step"] == [8]
    assert list(kept.iterdir()) == []


def test_recall_is_measured(folder, here):
    code, out, err = here("recall", "recall.toml", "--json")
    assert code == 0, err
    (cell,) = json.loads(out)["cells"]
    assert 0 <= cell["accuracy"] <= 1
    assert cell["chance"] == 0.5
    assert cell["forward_time_ms_p50_a_sequence"] > 0
    assert cell["state_bytes"] > 0


def test_a_prepared_corpus_is_the_same_corpus(folder, here):
    code, out, err = here("prepare", "files:texts/*.txt", "tokens.bin")
    assert code == 0, err
    assert "--corpus memmap:tokens.bin" in out
    hashes = []
    for corpus, out in (("memmap:tokens.bin", "a"), ("files:texts/*.txt", "b")):
        options = ("--length", "32", "--corpus", corpus, "--out", out, "--json")
        code, out, err = here("loss", "loss.toml", *options)
        assert code == 0, err
        (cell,) = json.loads(out)["cells"]
        hashes.append((cell["corpus_sha256"], cell["val_loss_bits_per_byte"]))
    assert hashes[0] == hashes[1]


def spoilt_sidecar(folder, here):
    assert here("prepare", "files:texts/*.txt", "tokens.bin")[0] == 0
    (folder / "tokens.bin.json").write_text("{")


WRONG = {
    "missing": ((), "files:none/*.txt", "matches no file"),
    "empty": (("empty.txt", b""), "files:empty.txt", "give more text"),
    "short": (("short.txt", b"a few words"), "files:short.txt", "T = 32"),
    "binary": (("x.bin", b"\xff\xfe" * 4000), "files:x.bin", "unit byte"),
    "sidecar": (spoilt_sidecar, "memmap:tokens.bin", "seqscale prepare"),
    "unknown": ((), "pyton-source", "did you mean 'python-source'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_corpus_that_will_not_do_is_one_line_before_training(folder, here, name):
    made, corpus, said = WRONG[name]
    if callable(made):
        made(folder, here)
    elif made:
        (folder / made[0]).write_bytes(made[1])
    unit = ("--unit", "character") if name == "binary" else ()
    code, _, err = here("loss", "loss.toml", "--corpus", corpus, *unit)
    assert code == 2, err
    assert said in err
    assert err.startswith("seqscale: ")
    assert len(err.splitlines()) == 1
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("loss",), "seqscale loss --preset quick"),
        (("loss", "--preset", "qiuck"), "did you mean 'quick'"),
        (("recall", "--preset", "quick", "--task", "mqr"), "did you mean 'mqar'"),
        (("loss", "loss.toml", "--arch", "mambda2"), "did you mean 'mamba2'"),
        (("loss", "loss.toml", "--arch", "hyena"), "give a size too"),
        (("loss", "loss.toml", "--learning-rate", "0"), "learning_rates must be numbers > 0"),
        (("loss", "loss.toml", "--ranks", "3"), "3 ranks cannot share a batch of 4"),
        (("loss", "recall.toml"), "grid 1: unknown key 'tasks'"),
        (("loss", "texts"), "is a directory"),
        (("loss", "loss.toml", "--checkpoint-every", "-1"), "between checkpoints"),
    ],
)
def test_wrong_usage_is_one_line(folder, here, arguments, said):
    code, _, err = here(*arguments)
    assert code == 2, err
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (folder / "runs").exists()


def test_a_dry_run_trains_nothing(folder, here):
    code, out, err = here("loss", "loss.toml", "--seed", "0", "--seed", "1", "--dry-run")
    assert code == 0, err
    assert "4 of 4 cells to measure" in out
    assert "seed 1" in out
    assert not (folder / "runs").exists()
