import json
import math
from dataclasses import replace

import pytest

from harness import run, sweep, trials
from harness.trials import LossGrid, RecallGrid, narrowed, preset, trial_cells

LOSS = LossGrid(lengths=32, size="d64", batch=4, tokens=4 * 32 * 10)
RECALL = RecallGrid(tasks="parity", lengths=16, size="d64", batch=4, steps=10)


def refusal(call, *args, **options):
    """The one line of a ValueError."""
    with pytest.raises(ValueError, match=r".") as error:
        call(*args, **options)
    said = str(error.value)
    assert "\n" not in said
    return said


def refused(grid, **fields):
    return refusal(trial_cells, [replace(grid, **fields)])


# Cells


def test_every_combination_is_a_cell_with_an_identity_of_its_own():
    grid = replace(
        LOSS,
        archs=["mamba2", "hyena", "mamba2*2 + transformer"],
        lengths=[16, 64],
        size=["d64", "d128"],
        learning_rates=[1e-3, 2e-3],
        seeds=[0, 7],
        tokens=[1 << 12, 1 << 13],
    )
    cells = trial_cells([grid])
    assert len(cells) == len({case.key for case in cells}) == 3 * 2**5
    told = {
        (c.arch, c.seq_len, c.size, c.options["learning_rate"], c.seed, c.options["steps"])
        for c in cells
    }
    assert told == {
        (arch, length, size, rate, seed, tokens // (4 * length))
        for arch in ("mamba2", "hyena", "mamba2*2+transformer")
        for length in (16, 64)
        for size in ("d64", "d128")
        for rate in (1e-3, 2e-3)
        for seed in (0, 7)
        for tokens in (1 << 12, 1 << 13)
    }
    assert [c.seed for c in cells] == sorted(c.seed for c in cells)
    assert [c.arch for c in cells[:3]] == ["mamba2", "hyena", "mamba2*2+transformer"]


def test_a_cell_records_all_that_its_result_depends_on():
    grid = replace(LOSS, archs="rwkv7", evaluate_at=[64, 16, 64], ranks=2, parallel="fsdp")
    (case,) = trial_cells([grid])
    assert (case.kind, case.level, case.phase) == ("loss", "model", "train_step")
    assert (case.batch, case.seq_len, case.size, case.seed) == (4, 32, "d64", 0)
    assert (case.dtype, case.backend) == ("float32", "torch")
    assert case.options == {
        "steps": 10,
        "corpus": "python-source",
        "unit": "byte",
        "validation_tokens": 1 << 16,
        "validation_block": 2048,
        "learning_rate": 2e-3,
        "evaluate_at": [16, 64],
        "ranks": 2,
        "parallel": "fsdp",
    }
    assert json.loads(json.dumps(case.options)) == case.options

    (case,) = trial_cells([replace(RECALL, archs="rwkv7", seeds=3)])
    assert (case.kind, case.seed) == ("recall", 3)
    assert case.options == {
        "task": "parity",
        "settings": {},
        "steps": 10,
        "stop_at": 0.998,
        "learning_rate": 2e-3,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rates", 3e-3),
        ("seeds", 1),
        ("tokens", 4 * 32 * 11),
        ("corpus", "files:x.txt"),
        ("unit", "character"),
        ("validation_tokens", 1 << 15),
        ("validation_block", 4096),
        ("evaluate_at", 64),
        ("dtype", "bfloat16"),
        ("backend", "reference"),
        ("ranks", 2),
        ("size", "d128"),
        ("lengths", 64),
        ("batch", 2),
    ],
)
def test_each_field_of_a_loss_grid_is_part_of_the_identity(field, value):
    grid = replace(LOSS, archs="mamba2")
    (case,), (other,) = trial_cells([grid]), trial_cells([replace(grid, **{field: value})])
    assert case.key != other.key


def test_settings_of_a_task_are_part_of_the_identity_whether_said_or_not():
    grid = RecallGrid(tasks="mqar", lengths=64, size="d64", batch=4, steps=10, archs="mamba2")
    (default,) = trial_cells([grid])
    said = {"vocab_size": 8192, "pairs": 4, "power": 0.01, "random_fill": True}
    assert default.options["settings"] == said
    (same,) = trial_cells([replace(grid, settings={"pairs": 4})])
    assert same.key == default.key
    (other,) = trial_cells([replace(grid, settings={"pairs": 8})])
    assert other.key != default.key
    assert other.options["settings"] == {**said, "pairs": 8}


def test_fields_of_blocks_are_part_of_the_identity_and_of_the_label():
    grid = RecallGrid(tasks="mqar", lengths=64, size="d64", batch=4, steps=10, archs="mamba2")
    (default,) = trial_cells([grid])
    (slow,) = trial_cells([replace(grid, block={"decay_min": 0.05, "decay_max": 1.0})])
    assert "block" not in default.options  # records of before stay what they are
    assert slow.key != default.key
    assert slow.label.startswith("mamba2 decay_min=0.05 decay_max=1.0 mqar vocab_size=8192")


def test_tasks_and_settings_multiply():
    grid = RecallGrid(
        tasks=["mqar", "in-context-recall"],
        settings={"vocab_size": [32, 64]},
        lengths=64,
        size="d64",
        batch=4,
        steps=10,
        archs=["mamba2", "hyena"],
    )
    cells = trial_cells([grid, grid])  # each once
    assert len(cells) == 8
    assert {(c.options["task"], c.options["settings"]["vocab_size"]) for c in cells} == {
        (task, size) for task in grid.tasks for size in (32, 64)
    }
    grid = replace(grid, tasks="mqar", settings={"vocab_size": [32, 64], "pairs": [2, 4, 8]})
    assert len(trial_cells([grid])) == 12


def test_a_token_budget_gives_the_batch_of_each_length():
    grid = replace(LOSS, archs="hyena", lengths=[16, 32], batch=None, batch_tokens=256, tokens=2600)
    short, long = trial_cells([grid])
    assert (short.batch, long.batch) == (16, 8)
    assert short.options["steps"] == long.options["steps"] == 10


def test_the_device_chooses_dtype_and_backend_where_they_are_left_open():
    grid = replace(LOSS, archs="mamba2")
    (case,) = grid.cells("cuda")
    assert (case.dtype, case.backend) == ("bfloat16", "triton")
    (case,) = replace(grid, dtype="float32", backend="torch").cells("cuda")
    assert (case.dtype, case.backend) == ("float32", "torch")


# What cannot be


WHOLE = "must be a whole number >= 1, got"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch_tokens": 128}, "give batch (sequences a step) or batch_tokens, not both"),
        ({"lengths": ()}, "the grid has no lengths: give lengths = [...]"),
        ({"lengths": 0}, "lengths must be whole numbers >= 1, got 0"),
        ({"lengths": [32, "64"]}, "lengths must be whole numbers >= 1, got '64'"),
        ({"lengths": True}, "lengths must be whole numbers >= 1, got True"),
        ({"lengths": 1 << 60}, f"lengths must be whole numbers >= 1, got {1 << 60}"),
        ({"evaluate_at": [64, -1]}, "evaluate_at must be whole numbers >= 1, got -1"),
        ({"tokens": 1e6}, "tokens must be whole numbers >= 1, got 1000000.0"),
        ({"batch": 0}, f"batch {WHOLE} 0"),
        ({"batch": [4, 8]}, f"batch {WHOLE} [4, 8]"),
        ({"batch": None, "batch_tokens": 0}, f"batch_tokens {WHOLE} 0"),
        ({"batch": None, "batch_tokens": [64]}, f"batch_tokens {WHOLE} [64]"),
        ({"ranks": 0}, f"ranks {WHOLE} 0"),
        ({"ranks": [1, 2]}, f"ranks {WHOLE} [1, 2]"),
        ({"validation_tokens": 0}, f"validation_tokens {WHOLE} 0"),
        ({"validation_block": [64, 128]}, f"validation_block {WHOLE} [64, 128]"),
        (
            {"dtype": "bfloat"},
            "unknown dtype 'bfloat', expected one of auto, float32, bfloat16; did you mean "
            "'bfloat16'?",
        ),
        (
            {"parallel": "fdp"},
            "unknown parallel 'fdp', expected one of ddp, fsdp; did you mean 'fsdp'?",
        ),
        (
            {"backend": "torsh"},
            "unknown backend 'torsh', expected auto or one of reference, torch, triton; did you "
            "mean 'torch'?",
        ),
        ({"seeds": -1}, "seeds must be whole numbers >= 0, got -1"),
        ({"seeds": [0, 0.5]}, "seeds must be whole numbers >= 0, got 0.5"),
        ({"seeds": 1 << 31}, f"seeds must be whole numbers >= 0, got {1 << 31}"),
        ({"learning_rates": 0}, "learning_rates must be numbers > 0, got 0"),
        ({"learning_rates": [1e-3, math.nan]}, "learning_rates must be numbers > 0, got nan"),
        ({"learning_rates": math.inf}, "learning_rates must be numbers > 0, got inf"),
        ({"learning_rates": True}, "learning_rates must be numbers > 0, got True"),
        ({"learning_rates": "1e-3"}, "learning_rates must be numbers > 0, got '1e-3'"),
        ({"archs": ()}, "archs must be a name or a list of names, got []"),
        ({"archs": [3]}, "archs must be a name or a list of names, got [3]"),
        ({"size": 64}, "size must be a name or a list of names, got [64]"),
        (
            {"size": "64d"},
            "unknown size '64d': write d256 for a width or 1M for matched parameters",
        ),
        ({"size": "100K"}, "size 100K: matched sizes begin at 200,000"),
        ({"archs": "hyena", "size": "d64h16"}, "hyena has no heads: give a width alone, as d256"),
        (
            {"batch": None},
            "batch_tokens = None is not a multiple of length 32: every length must divide it, or "
            "give batch",
        ),
        (
            {"batch": None, "batch_tokens": 100},
            "batch_tokens = 100 is not a multiple of length 32: every length must divide it, or "
            "give batch",
        ),
        ({"ranks": 3}, "3 ranks cannot share a batch of 4: choose another"),
        (
            {"batch": None, "batch_tokens": 96, "ranks": 2},
            "2 ranks cannot share a batch of 3: choose another",
        ),
        (
            {"unit": "bytes"},
            "unknown unit 'bytes', expected one of byte, character; did you mean 'byte'?",
        ),
        (
            {"unit": ["byte"]},
            "unknown unit \"['byte']\", expected one of byte, character; did you mean 'byte'?",
        ),
        ({"corpus": 3}, "corpus must be a name, got 3"),
        (
            {"lengths": 48, "validation_block": 2048},
            "validation_block = 2048 is not a multiple of length 48: give one that is, so that all "
            "lengths validate on the same tokens",
        ),
        (
            {"evaluate_at": [64, 4096], "validation_block": 2048},
            "validation_block = 2048 is not a multiple of length 4096: give one that is, so that "
            "all lengths validate on the same tokens",
        ),
        (
            {"evaluate_at": 48},
            "validation_block = 48 is not a multiple of length 32: give one that is, so that all "
            "lengths validate on the same tokens",
        ),
        ({"validation_block": 0}, f"validation_block {WHOLE} 0"),
        ({"tokens": [1280, 127]}, "tokens = 127 is less than a step of 4 x 32"),
        ({"tokens": []}, "the sweep has no cells"),
    ],
)
def test_a_loss_grid_that_cannot_be_is_refused_with_one_line(fields, said):
    assert refused(LOSS, **fields) == said


def test_the_validation_block_is_the_longest_length_where_2048_is_no_multiple():
    def block(**fields):
        (found,) = {c.options["validation_block"] for c in trial_cells([replace(LOSS, **fields)])}
        return found

    assert block(archs="hyena", lengths=[16, 64], evaluate_at=2048) == 2048
    assert block(archs="hyena", lengths=[16, 48], evaluate_at=96) == 96
    assert block(archs="hyena", evaluate_at=4096) == 4096
    assert block(archs="hyena", validation_block=64) == 64


def test_an_unknown_architecture_is_told_the_nearest():
    assert "did you mean 'mamba2'?" in refused(LOSS, archs="mamba")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 0}, f"steps {WHOLE} 0"),
        ({"steps": [10, 20]}, f"steps {WHOLE} [10, 20]"),
        ({"settings": 3}, "settings must be a table, got 3"),
        ({"stop_at": 0}, "stop_at must be an accuracy of at most 1, got 0"),
        ({"stop_at": 99.8}, "stop_at must be an accuracy of at most 1, got 99.8"),
        ({"stop_at": True}, "stop_at must be an accuracy of at most 1, got True"),
        ({"stop_at": "1"}, "stop_at must be an accuracy of at most 1, got '1'"),
        ({"stop_at": math.nan}, "stop_at must be an accuracy of at most 1, got nan"),
        ({"tasks": []}, "tasks must be a name or a list of names, got []"),
        ({"settings": {"bits": 3}}, "parity has no settings: leave out 'bits'"),
        (
            {"tasks": "mqar", "settings": {"pair": 3}},
            "mqar: unknown setting 'pair', expected one of vocab_size, pairs, power, random_fill; "
            "did you mean 'pairs'?",
        ),
        (
            {"tasks": "mqar", "settings": {"pairs": [2, 2.5]}, "lengths": 64},
            "mqar: pairs must be a whole number, got 2.5",
        ),
        (
            {"tasks": "mqar", "settings": {"pairs": 5}},
            "mqar: seq_len must be a whole number >= 4 * pairs = 20, got 16",
        ),
        (
            {"tasks": "mqar", "evaluate_at": 8},
            "mqar: seq_len must be a whole number >= 4 * pairs = 16, got 8",
        ),
        (
            {"tasks": "mqar", "size": "1M", "archs": "mamba2"},
            "no mamba2 within 1 % of 1000000 parameters: choose another size",
        ),
        ({"block": 3}, "block must be a table, got 3"),
        (
            {"block": {"decay_mx": 1.0}, "archs": "mamba2"},
            "unknown field of mamba2 at size d64 'decay_mx', expected one of conv_width, d_state, "
            "decay_max, decay_min, dt_floor, dt_max, dt_min, expand, groups, head_dim, norm_eps; "
            "did you mean 'decay_max'?",
        ),
        (
            {"block": {"d_state": 8}, "archs": "mamba2", "size": "d64n16"},
            "unknown field of mamba2 at size d64n16 'd_state', expected one of conv_width, "
            "decay_max, decay_min, dt_floor, dt_max, dt_min, expand, groups, head_dim, norm_eps",
        ),
        (
            {"block": {"decay_max": "1"}, "archs": "mamba2"},
            "block: decay_max must be a number, or true or false, got '1'",
        ),
        (
            {"block": {"decay_max": 0.5}, "archs": "mamba2"},
            "mamba2 at size d64: decays need 0 < decay_min <= decay_max, got 1.0 and 0.5",
        ),
        (
            {"block": {"kv_heads": 1}, "archs": "transformer+hyena"},
            "a hybrid has blocks of several kinds: give block to one architecture",
        ),
    ],
)
def test_a_recall_grid_that_cannot_be_is_refused_with_one_line(fields, said):
    assert refused(RECALL, **fields) == said


def test_an_unknown_task_is_told_the_nearest():
    said = refused(RECALL, tasks="memorization")
    assert said.startswith("unknown task 'memorization', expected one of mqar, ")
    assert said.endswith("; did you mean 'memorisation'?")


# Files


def load(tmp_path, kind, text):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return sweep.load(path, kind)


def test_loss_grids_are_read_from_toml(tmp_path):
    grids = load(
        tmp_path,
        LossGrid,
        """
        [[grid]]
        archs = ["mamba2", "rwkv7"]
        lengths = [16, 32]
        size = "d64"
        batch_tokens = 128
        tokens = 1280
        learning_rates = [1e-3, 3e-3]

        [[grid]]
        archs = "hyena"
        lengths = 64
        size = "d64"
        batch = 2
        tokens = [1280, 2560]
        evaluate_at = 128
        """,
    )
    assert grids == (
        LossGrid(
            archs=["mamba2", "rwkv7"],
            lengths=[16, 32],
            size="d64",
            batch_tokens=128,
            tokens=1280,
            learning_rates=[1e-3, 3e-3],
        ),
        LossGrid(
            archs="hyena", lengths=64, size="d64", batch=2, tokens=[1280, 2560], evaluate_at=128
        ),
    )
    assert len(trial_cells(grids)) == 8 + 2


def test_recall_grids_are_read_from_toml(tmp_path):
    (grid,) = load(
        tmp_path,
        RecallGrid,
        """
        [[grid]]
        tasks = "mqar"
        settings = { vocab_size = 64, pairs = [2, 4] }
        archs = "mamba2"
        lengths = 32
        size = "d64"
        batch = 4
        steps = 10
        """,
    )
    assert [c.options["settings"]["pairs"] for c in trial_cells([grid])] == [2, 4]


def test_a_key_that_is_none_is_told_the_nearest(tmp_path):
    said = refusal(load, tmp_path, LossGrid, "[[grid]]\ntokens = 10\nlength = 3\n")
    assert f"{tmp_path}/sweep.toml: grid 1: unknown key 'length', expected one of archs, " in said
    assert said.endswith("; did you mean 'lengths'?")
    said = refusal(load, tmp_path, RecallGrid, "[[grid]]\ntask = 'parity'\nsteps = 3\n")
    assert said.endswith("; did you mean 'tasks'?")


def test_a_key_that_is_missing_is_named(tmp_path):
    said = refusal(load, tmp_path, LossGrid, "[[grid]]\nlengths = 3\n")
    assert said == f"{tmp_path}/sweep.toml: grid 1: no tokens"
    said = refusal(load, tmp_path, RecallGrid, "[[grid]]\ntasks = 'parity'\n")
    assert said == f"{tmp_path}/sweep.toml: grid 1: no steps"


# Presets, and what replaces their fields


@pytest.mark.parametrize(
    ("kind", "name"),
    [(k, n) for k in (LossGrid, RecallGrid) for n in trials.PRESETS[k.kind]],
)
def test_every_preset_has_cells(kind, name):
    cells = trial_cells(preset(kind, name))
    assert {case.kind for case in cells} == {kind.kind}


def test_an_unknown_preset_is_told_the_nearest():
    said = refusal(preset, LossGrid, "quik")
    assert said.startswith("unknown preset 'quik', expected one of demo, quick, ")
    assert said.endswith("; did you mean 'quick'?")


def test_narrowing_replaces_fields_and_one_batch_the_other():
    (grid,) = narrowed([LOSS], lengths=[64], seeds=None, batch_tokens=256)
    assert (grid.lengths, grid.seeds, grid.batch, grid.batch_tokens) == ([64], 0, None, 256)
    (grid,) = narrowed([grid], batch=2)
    assert (grid.batch, grid.batch_tokens) == (2, None)


def test_narrowing_keeps_each_architecture_at_its_sizes():
    both = [replace(LOSS, archs=("transformer", "hyena")), replace(LOSS, archs="rwkv7")]
    assert [grid.archs for grid in narrowed(both, archs=["rwkv7"])] == [["rwkv7"]]
    assert [g.archs for g in narrowed(both, archs=["hyena", "mamba2"])] == [
        ["hyena", "mamba2"],
        ["mamba2"],
    ]
    heads = replace(LOSS, archs="rwkv7", size="d64h16")
    given = replace(RECALL, archs="mamba2", block={"decay_max": 2.0})
    for grid in (heads, given):
        assert refusal(narrowed, [grid], archs=["hyena"]) == (
            "the sweep has no such architecture at its sizes: give a size too"
        )


# Running


@pytest.fixture
def nothing_runs(monkeypatch):
    """No worker may be started."""

    def start(*_):
        raise AssertionError("a cell was run")

    monkeypatch.setattr(run, "Worker", start)


def text(path, words):
    path.write_text(words)
    return f"files:{path}"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"corpus": "python-sauce"}, "did you mean 'python-source'?"),
        ({"corpus": "files:/nowhere/*.txt"}, "matches no file"),
        ({"lengths": 4096, "validation_block": 4096}, "training tokens are too few"),
        ({"validation_block": 512}, "validation tokens are too few"),
        # 2,000 characters: embedding and head alone are too many.
        ({"unit": "character", "size": "200K", "archs": "rwkv7"}, "no rwkv7 within 1 % of 200000"),
    ],
)
def test_a_corpus_that_cannot_be_is_refused_before_any_cell(tmp_path, nothing_runs, fields, said):
    grid = replace(
        LOSS,
        tokens=1 << 20,
        batch=1,
        corpus=text(tmp_path / "text", "".join(map(chr, range(256, 2256)))),
        validation_block=64,
    )
    with pytest.raises(ValueError, match=r".") as error:
        trials.run([replace(grid, **fields)], tmp_path / "run", device="cpu")
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


def test_recall_has_one_thread_unless_another_number_is_given(tmp_path, monkeypatch):
    asked = []

    def into(out, cells, settings, **reporting):
        asked.append(settings.threads)

    monkeypatch.setattr(trials, "into", into)
    grid = replace(RECALL, archs="mamba2")
    corpus = text(tmp_path / "a.txt", "all is one and one is all\n" * 1000)
    loss = replace(LOSS, archs="mamba2", corpus=corpus, validation_tokens=256, validation_block=32)
    for grids, threads in (([grid], None), ([grid], 2), ([grid, loss], None)):
        trials.run(grids, tmp_path, device="cpu", threads=threads)
    assert asked == [1, 2, None]


def test_a_negative_time_between_checkpoints_is_refused(tmp_path, nothing_runs):
    with pytest.raises(ValueError, match="between checkpoints"):
        trials.run([RECALL], tmp_path / "run", device="cpu", checkpoint_every_s=-1)
    assert not (tmp_path / "run").exists()
