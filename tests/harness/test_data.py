import hashlib
import json
import math
import os
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import corpus as corpora
from harness import data, token_file


@pytest.fixture(scope="module")
def python_source():
    return data.load("python-source")


@pytest.fixture(autouse=True)
def nothing_cached():
    data.load.cache_clear()


def corpus_of(train, validation, **fields):
    """A corpus of streams made by hand."""
    fields = {"name": "tiny", "unit": "byte", "vocab_size": 256, "sha256": "", **fields}
    streams = [np.asarray(stream, np.uint8) for stream in (train, validation)]
    return corpora.Corpus(
        train=streams[0], validation=streams[1], documents=1, bytes_per_token=1.0, **fields
    )


def folder(path, texts):
    """Files of these texts by name; returns the corpus of them all."""
    for name, text in texts.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"files:{path}/**/*"


def refusal(call, *args):
    """The one line of a ValueError."""
    with pytest.raises(ValueError, match=r".") as error:
        call(*args)
    said = str(error.value)
    assert "\n" not in said
    return said


def documents_of(stream):
    """The documents of a stream of bytes in which each ends with the separator."""
    *texts, rest = bytes(stream).split(data.SEPARATOR)
    assert rest == b""
    return texts


# Python's own sources


def test_python_source_is_large_real_and_split(python_source):
    assert len(python_source.train) > 10e6
    assert 0.02 < len(python_source.validation) / len(python_source.train) < 0.2
    assert bytes(python_source.train[:200_000]).count(b"import ") > 10
    assert python_source.name == "python-source"
    assert (python_source.unit, python_source.vocab_size) == ("byte", 256)
    assert python_source.bytes_per_token == 1.0


def test_no_document_is_in_both_parts(python_source):
    parts = [documents_of(s) for s in (python_source.train, python_source.validation)]
    assert len(parts[0]) + len(parts[1]) == python_source.documents
    long = [{d for d in part if len(d) > 2000} for part in parts]
    assert len(long[1]) > 20
    assert not long[0] & long[1]


def test_a_process_loads_a_corpus_once():
    assert data.load("python-source") is data.load("python-source")


# Windows


def test_batches_are_reproducible_shifted_windows_of_the_training_stream(python_source):
    draws = [python_source.batch(4, 100, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    inputs, targets = draws[0]
    assert inputs.shape == targets.shape == (4, 100)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, draws[1][0])
    assert not torch.equal(inputs, draws[2][0])
    text = bytes(python_source.train)
    for row, following in zip(inputs, targets[:, -1:], strict=True):
        assert bytes([*row, *following]) in text


def test_every_training_window_can_be_drawn():
    corpus = corpus_of(range(10), range(10))
    inputs, targets = corpus.batch(1000, 7, torch.Generator().manual_seed(0))
    assert set(inputs[:, 0].tolist()) == {0, 1, 2}
    assert torch.equal(targets, inputs + 1)


@given(st.data())
def test_windows_of_every_length_validate_the_same_targets(draw):
    lengths = draw.draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 6, 8]), min_size=2, max_size=4))
    block = math.lcm(*lengths) * draw.draw(st.integers(1, 3))
    size = block + 1 + draw.draw(st.integers(0, 5 * block))
    tokens = draw.draw(st.integers(1, 8 * block))
    stream = np.arange(size, dtype=np.uint32)  # a token says where it stands
    corpus = replace(corpus_of([], []), validation=stream)
    seen = [corpus.validation_windows(length, tokens, block) for length in lengths]
    for length, (inputs, targets) in zip(lengths, seen, strict=True):
        assert inputs.shape == targets.shape == (targets.numel() // length, length)
        assert torch.equal(inputs + 1, targets)
        assert torch.equal(targets.flatten(), seen[0][1].flatten())
    targets = seen[0][1].flatten().tolist()
    assert (
        len(set(targets))
        == len(targets)
        == block * min(max(1, tokens // block), (size - 1) // block)
    )
    assert min(targets) >= 1
    assert max(targets) < size


def test_validation_blocks_spread_over_the_stream():
    corpus = corpus_of([], range(101))
    _, targets = corpus.validation_windows(seq_len=5, tokens=40, block=10)
    assert targets[::2, 0].tolist() == [1, 26, 51, 76]
    assert targets[1::2, -1].tolist() == [10, 35, 60, 85]


def test_a_block_that_lacks_its_last_target_does_not_count():
    corpus = corpus_of([], range(20))
    _, targets = corpus.validation_windows(seq_len=10, tokens=20, block=10)
    assert targets.tolist() == [list(range(1, 11))]


def test_validation_of_another_dtype_is_int64():
    corpus = replace(corpus_of([], []), validation=np.array([70_000, 65_000, 2], "<u4"))
    inputs, targets = corpus.validation_windows(2, 2, 2)
    assert inputs.tolist() == [[70_000, 65_000]]
    assert targets.tolist() == [[65_000, 2]]
    assert targets.dtype == torch.int64


def test_a_corpus_shorter_than_a_window_is_refused():
    corpus = corpus_of(range(50), range(21))
    said = refusal(corpus.batch, 1, 50, torch.Generator())
    assert said == (
        "tiny: 50 training tokens are too few for T = 50, which takes 51: "
        "give a shorter T or a larger corpus"
    )
    assert corpus.batch(1, 49, torch.Generator())[0].shape == (1, 49)
    said = refusal(corpus.validation_windows, 7, 21, 21)
    assert said == (
        "tiny: 21 validation tokens are too few for a block of 21, which takes 22: "
        "give a smaller block or a larger corpus"
    )
    assert corpus.validation_windows(20, 20, 20)[0].shape == (1, 20)
    assert refusal(corpus.validation_windows, 3, 20, 20) == (
        "T = 3 does not divide the validation block of 20 tokens: "
        "give a block that is a multiple of every T"
    )


def test_check_finds_the_first_length_that_does_not_fit():
    corpus = corpus_of(range(50), range(65))
    data.check(corpus, [8, 16, 32], block=64, validation_tokens=640)
    assert "too few for T = 64" in refusal(data.check, corpus, [8, 64, 3], 64, 640)
    assert "T = 3 does not divide" in refusal(data.check, corpus, [8, 3, 64], 64, 640)
    assert "too few for a block of 128" in refusal(data.check, corpus, [8], 128, 640)
    assert "at least one token, got 0" in refusal(data.check, corpus, [8], 64, 0)


# Entropies


def test_entropies_by_hand():
    # Two tokens in turn: one bit each, none once the one before is known.
    assert data.entropies(np.array([0, 1, 0, 1], np.uint8), 256) == (1.0, 0.0)
    assert data.entropies(np.array([5, 5, 5], np.uint8), 6) == (0.0, 0.0)
    # After 0 (twice) one bit, after 1 (once) none.
    token, following = data.entropies(np.array([0, 0, 1, 0], np.uint16), 2)
    assert token == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert following == pytest.approx(2 / 3)
    assert "takes two tokens, got 1" in refusal(data.entropies, np.array([1], np.uint8), 256)


@given(st.lists(st.integers(0, 400), min_size=2, max_size=60), st.integers(1, 9))
def test_entropies_are_those_of_the_counts(stream, pairs_at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PAIRS", pairs_at_once)
        token, following = data.entropies(np.array(stream, np.uint16), 401)
    n = len(stream)
    tokens, before = Counter(stream), Counter(stream[:-1])
    pairs = Counter(pairwise(stream))
    assert token == pytest.approx(-sum(c / n * math.log2(c / n) for c in tokens.values()))
    wanted = -sum(c / (n - 1) * math.log2(c / before[a]) for (a, _), c in pairs.items())
    assert following == pytest.approx(wanted, abs=1e-9)


def test_bytes_of_python_hold_what_is_known_of_them(python_source):
    token, following = data.entropies(python_source.validation, 256)
    assert 4 < token < 5.5
    assert 3 < following < token - 0.5


# Files


def test_files_go_whole_to_either_part_by_their_names(tmp_path):
    texts = {f"{n % 7}/{n}.txt": f"document {n}" for n in range(200)}
    found = data.load(folder(tmp_path, texts))
    assert found.documents == 200
    parts = [documents_of(s) for s in (found.train, found.validation)]
    by_hash = {
        text.encode()
        for name, text in texts.items()
        if hashlib.sha256(name.encode()).digest()[0] % 16 == 0
    }
    assert set(parts[1]) == by_hash
    assert 3 < len(by_hash) < 30
    assert sorted(parts[0] + parts[1]) == sorted(text.encode() for text in texts.values())
    in_order = [texts[name].encode() for name in sorted(texts)]
    assert parts[0] == [text for text in in_order if text not in by_hash]


def test_the_machine_s_paths_do_not_enter_a_corpus(tmp_path):
    texts = {f"{n % 3}/{n}.txt": f"document {n}" for n in range(40)}
    here, there = (data.load(folder(tmp_path / at, texts)) for at in ("here", "there/and/on"))
    assert here.name != there.name
    assert here.sha256 == there.sha256
    assert np.array_equal(here.validation, there.validation)


@given(st.sets(st.text(st.characters(codec="utf-8"), min_size=1), min_size=2, max_size=30))
def test_no_part_is_ever_empty(names):
    held_out = data._held_out(sorted(names))
    assert 0 < len(held_out) < len(names)
    assert held_out < names


def test_where_the_hash_leaves_a_part_empty_the_smallest_hash_is_validation():
    def digest(name):
        return hashlib.sha256(name.encode()).digest()

    everything = [str(n) for n in range(100)]
    training = [name for name in everything if digest(name)[0] % 16][:5]
    validation = [name for name in everything if not digest(name)[0] % 16][:3]
    for names in (training, validation):
        assert data._held_out(names) == {min(names, key=digest)}
    assert data._held_out(training + validation) == set(validation)


def test_one_document_is_parted_at_nine_tenths_and_gets_no_separator(tmp_path):
    folder(tmp_path, {"a.txt": bytes(range(103))})
    found = data.load(f"files:{tmp_path}/a.txt")
    assert found.train.tolist() == list(range(92))  # int(0.9 * 103)
    assert found.validation.tolist() == list(range(92, 103))
    assert found.documents == 1


def test_a_glob_goes_into_folders_and_home(tmp_path, monkeypatch):
    folder(tmp_path, {"b/c/one.txt": "one", "two.txt": "two", "b/three.md": "three"})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "b")
    assert data.load("files:~/**/*.txt").documents == 2
    assert data.load("files:**/*").documents == 2
    found = data.load("files:../*.txt")
    assert bytes(found.train) + bytes(found.validation) == b"two"


def test_a_file_name_may_be_no_text(tmp_path):
    name = folder(tmp_path, {"a": "one", "b": "two"})
    (tmp_path / os.fsdecode(b"\xff")).write_bytes(b"three")
    found = data.load(name)
    texts = documents_of(found.train) + documents_of(found.validation)
    assert sorted(texts) == [b"one", b"three", b"two"]


def test_bytes_may_be_anything(tmp_path):
    texts = {"a": b"\xff\0\x80", "b": b"\0" * 5}
    found = data.load(folder(tmp_path, texts))
    streams = {bytes(found.train), bytes(found.validation)}
    assert streams == {text + b"\0" for text in texts.values()}


def test_the_hash_pins_texts_split_and_unit(tmp_path):
    texts = {f"{n}": f"document {n}" for n in range(40)}
    first = data.load(folder(tmp_path / "first", texts))
    changed = data.load(folder(tmp_path / "changed", {**texts, "7": "another"}))
    characters = data.load(f"files:{tmp_path}/first/**/*", "character")
    other_names = {f"x{name}": text for name, text in texts.items()}
    moved = data.load(folder(tmp_path / "moved", other_names))
    assert len({c.sha256 for c in (first, changed, characters, moved)}) == 4
    assert all(len(c.sha256) == 64 for c in (first, changed, characters, moved))


def test_the_hash_depends_on_all_that_it_is_made_of():
    made_of = ["character", "ab", 10, "0123"]
    changed = [("byte", 0), ("ba", 1), (None, 1), (11, 2), ("0124", 3)]
    others = [[*made_of[:at], value, *made_of[at + 1 :]] for value, at in changed]
    assert len({corpora.pin(*arguments) for arguments in (made_of, *others)}) == 6


# Characters


def test_characters_are_numbered_in_order(tmp_path):
    folder(tmp_path, {"a.txt": "bβa€bb😀aab"})
    found = data.load(f"files:{tmp_path}/a.txt", "character")
    assert found.alphabet == "abβ€😀"
    assert found.vocab_size == 5
    assert found.train.tolist() == [1, 2, 0, 3, 1, 1, 4, 0, 0]
    assert found.validation.tolist() == [1]
    assert found.train.dtype == np.uint8


def test_characters_of_several_documents_have_a_separator(tmp_path):
    found = data.load(folder(tmp_path, {"a": "xyé", "b": "yé", "c": "é"}), "character")
    assert found.alphabet == "\0xyé"
    streams = [[found.alphabet[token] for token in s] for s in (found.train, found.validation)]
    texts = ["".join(stream) for stream in streams]
    assert sorted("".join(texts).split("\0")) == ["", "xyé", "yé", "é"]
    assert all(text.endswith("\0") for text in texts)
    assert found.bytes_per_token == len(texts[1].encode()) / len(texts[1]) > 1


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=2))
def test_characters_come_back_from_their_tokens(tmp_path_factory, text):
    data.load.cache_clear()
    file = tmp_path_factory.getbasetemp() / "text"
    file.write_bytes(text.encode())
    found = data.load(f"files:{file}", "character")
    tokens = [*found.train, *found.validation]
    assert "".join(found.alphabet[token] for token in tokens) == text
    assert len(found.train) == int(0.9 * len(text))
    assert list(found.alphabet) == sorted(set(text))
    held_out = text[len(found.train) :]
    assert found.bytes_per_token == len(held_out.encode()) / len(held_out)


def test_many_characters_take_two_bytes_a_token(tmp_path):
    text = "".join(map(chr, range(1, 1001)))
    folder(tmp_path, {"a": text})
    found = data.load(f"files:{tmp_path}/a", "character")
    assert found.train.dtype == np.uint16
    assert [*found.train, *found.validation] == list(range(1000))


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")],
)
def test_the_smallest_dtype_holds_every_token(size, dtype):
    assert token_file.smallest_dtype(size).name == dtype


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"\xffabc", "not UTF-8 text"), (b"a\0b", "not text (it has a NUL)")],
)
def test_a_binary_file_has_no_characters(tmp_path, content, fault):
    name = folder(tmp_path, {"a.txt": "text", "b.bin": content})
    assert refusal(data.load, name, "character") == (
        f"{name}: 'b.bin' is {fault}: ask for unit byte instead of character"
    )
    assert data.load(name).documents == 2


# Names that are none


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("python-sources", "python-source"),
        ("file:x.txt", "files:GLOB"),
        ("memap:x", "memmap:PATH"),
        ("hff:x", "hf:NAME"),
    ],
)
def test_an_unknown_corpus_is_told_the_nearest(name, nearest):
    assert refusal(data.load, name) == (
        f"unknown corpus {name!r}, expected one of python-source, files:GLOB, memmap:PATH, "
        f"hf:NAME; did you mean {nearest!r}?"
    )


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("files", "files:GLOB"),
        ("memmap:", "memmap:PATH"),
        ("hf:", "hf:NAME"),
        ("python-source:3.11", "python-source"),
    ],
)
def test_a_name_without_its_second_half_is_refused(name, form):
    assert refusal(data.load, name) == f"corpus {name!r}: expected {form}"


def test_an_unknown_unit_is_refused():
    said = refusal(data.load, "python-source", "characters")
    assert said == (
        "unknown unit 'characters', expected one of byte, character; did you mean 'character'?"
    )


def test_a_glob_of_nothing_is_refused(tmp_path):
    name = f"files:{tmp_path}/*.text"
    assert refusal(data.load, name) == f"{name} matches no file: give another glob"


def test_a_directory_is_no_corpus(tmp_path):
    assert refusal(data.load, f"files:{tmp_path}/") == (
        f"files:{tmp_path}/ matches a directory and no file: "
        f"give a glob of files, as files:{tmp_path}/*.txt"
    )
    assert refusal(data.load, f"memmap:{tmp_path}") == (
        f"{tmp_path} is a directory: give the token file in it"
    )
    assert refusal(data.prepare, "python-source", tmp_path) == (
        f"{tmp_path} is a directory: give the file to write"
    )


@pytest.mark.parametrize("unit", corpora.UNITS)
@pytest.mark.parametrize("texts", [{"a": ""}, {"a": "", "b": "", "c": ""}, {"a": "x"}])
def test_too_little_to_part_is_refused(tmp_path, unit, texts):
    name = folder(tmp_path, texts)
    size = sum(map(len, texts.values()))
    assert refusal(data.load, name, unit) == (
        f"{name}: {size} bytes in {len(texts)} documents: give more text"
    )


# Token files


@pytest.fixture
def texts(tmp_path):
    content = {f"{n}.txt": f"document {n} β" * (n + 1) for n in range(30)}
    return folder(tmp_path / "texts", content)


@pytest.mark.parametrize("unit", corpora.UNITS)
def test_a_token_file_holds_the_same_corpus(tmp_path, texts, unit):
    out = tmp_path / "new" / "tokens.bin"
    steps = []
    written = data.prepare(texts, out, unit, on_progress=lambda *step: steps.append(step))
    assert steps == [(n, 30) for n in range(1, 31)]
    direct, mapped = data.load(texts, unit), data.load(f"memmap:{out}", unit)
    assert isinstance(mapped.train, np.memmap)
    for found in (written, mapped):
        assert found.name == f"memmap:{out}"
        for field in ("unit", "vocab_size", "sha256", "documents", "bytes_per_token", "alphabet"):
            assert getattr(found, field) == getattr(direct, field)
        assert found.train.dtype == direct.train.dtype
        assert np.array_equal(found.train, direct.train)
        assert np.array_equal(found.validation, direct.validation)
    assert out.read_bytes() == direct.train.tobytes() + direct.validation.tobytes()
    about = json.loads((tmp_path / "new" / "tokens.bin.json").read_text())
    assert about["source"] == texts
    assert about["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    draws = [c.batch(3, 20, torch.Generator().manual_seed(0))[0] for c in (direct, mapped)]
    assert torch.equal(*draws)


def test_tokens_of_two_bytes_are_little_endian(tmp_path):
    text = "".join(map(chr, range(1, 1001)))
    name = folder(tmp_path / "texts", {"a": text})
    found = data.prepare(name, tmp_path / "tokens", "character")
    assert [*found.train, *found.validation] == list(range(1000))
    assert (tmp_path / "tokens").read_bytes()[2 * 258 :][:4] == b"\x02\x01\x03\x01"


def test_preparing_again_replaces_what_a_process_had_loaded(tmp_path, texts):
    out = tmp_path / "tokens"
    data.prepare(texts, out)
    old = data.load(f"memmap:{out}")
    other = folder(tmp_path / "other", {"a": "something else"})
    data.prepare(other, out)
    found = data.load(f"memmap:{out}")
    assert bytes(found.train) == b"something el"
    assert len(old.train) > 1000  # what is mapped stays as it was
    assert old.sha256 != found.sha256


def test_home_is_expanded_and_the_name_kept(tmp_path, texts, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data.prepare(texts, tmp_path / "tokens")
    assert data.load("memmap:~/tokens").name == "memmap:~/tokens"


def test_a_token_file_of_the_other_unit_is_refused(tmp_path, texts):
    name = f"memmap:{tmp_path}/tokens"
    data.prepare(texts, tmp_path / "tokens", "character")
    assert refusal(data.load, name) == (
        f"{name}: a token is a character, not a byte: ask for unit character"
    )


@pytest.mark.parametrize("name", ["tokens", "tokens.json"])
@pytest.mark.parametrize("after", [0, 5])
def test_a_writer_that_fails_leaves_no_half_written_file(tmp_path, texts, monkeypatch, name, after):
    out = tmp_path / "out" / "tokens"
    if after:
        data.prepare(texts, out)
    before = {path: path.read_bytes() for path in out.parent.glob("*")}
    other = folder(tmp_path / "other", {"a": "something else"})
    replace_file = type(out).replace

    def fail(path, target):
        if target.name == name:
            raise OSError(28, "No space left on device")
        return replace_file(path, target)

    monkeypatch.setattr(type(out), "replace", fail)
    with pytest.raises(OSError, match="No space left") as error:
        data.prepare(other, out)
    assert error.value.filename == str(out.with_name(name))
    left = {path: path.read_bytes() for path in out.parent.glob("*")}
    if name == "tokens":
        assert left == before
        return
    assert set(left) == {out, *before}
    assert "run seqscale prepare again" in refusal(data.load, f"memmap:{out}")


def test_tokens_are_on_the_disk_before_they_get_their_name(tmp_path, texts, monkeypatch):
    events = []
    sync, replace_file = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("sync"), sync(file)))

    def record(path, target):
        events.append(target.name)
        return replace_file(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", record)
    data.prepare(texts, tmp_path / "tokens")
    assert events == ["sync", "tokens", "sync", "tokens.json"]


def damage_of(path):
    """What loading says of a damaged token file, less its fix."""
    said = refusal(data.load, f"memmap:{path}")
    assert said.endswith(": run seqscale prepare again")
    return said.removesuffix(": run seqscale prepare again")


def test_a_token_file_that_was_changed_is_refused(tmp_path, texts):
    path = tmp_path / "tokens"
    data.prepare(texts, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert damage_of(path) == f"{path}: its SHA-256 is not the one in its sidecar"
    path.write_bytes(whole[:-1])
    assert damage_of(path) == (f"{path}: {len(whole) - 1:,} bytes, its sidecar says {len(whole):,}")
    path.write_bytes(b"")
    assert "0 bytes, its sidecar says" in damage_of(path)
    path.unlink()
    assert damage_of(path) == f"{path}: not there"


@pytest.mark.parametrize("read_bytes", [4, 1 << 22])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(token_file, "READ_BYTES", read_bytes)
    path = tmp_path / "tokens"
    name = folder(tmp_path / "texts", {"a": "abcabcabcabc"})
    data.prepare(name, path, "character")
    content = b"\x03" + path.read_bytes()[1:]
    path.write_bytes(content)
    change_sidecar(path, sha256=hashlib.sha256(content).hexdigest())
    assert damage_of(path) == f"{path}: token 3 in a vocabulary of 3"


def change_sidecar(path, **changes):
    sidecar = path.with_name(path.name + ".json")
    about = {**json.loads(sidecar.read_text()), **changes}
    sidecar.write_text(json.dumps({k: v for k, v in about.items() if v is not ...}))


@pytest.mark.parametrize("key", token_file.KEYS)
def test_a_sidecar_without_a_key_is_refused(tmp_path, texts, key):
    data.prepare(texts, tmp_path / "tokens")
    change_sidecar(tmp_path / "tokens", **{key: ...})
    assert damage_of(tmp_path / "tokens") == f"{tmp_path}/tokens.json: no {key}"


@pytest.mark.parametrize(
    ("unit", "key", "value"),
    [
        ("byte", "unit", "word"),
        ("byte", "unit", "character"),
        ("character", "unit", "byte"),
        ("byte", "unit", 1),
        ("byte", "alphabet", "ab"),
        ("character", "alphabet", "abc"),
        ("character", "alphabet", 3),
        ("byte", "vocab_size", 255),
        ("byte", "vocab_size", 256.0),
        ("character", "vocab_size", 3),
        ("byte", "dtype", "int64"),
        ("byte", "dtype", None),
        ("byte", "train_tokens", 0),
        ("byte", "train_tokens", True),
        ("byte", "train_tokens", "10"),
        ("byte", "validation_tokens", 0),
        ("byte", "sha256", None),
        ("byte", "source", None),
        ("byte", "documents", 0),
        ("byte", "bytes_per_token", 1.5),
        ("character", "bytes_per_token", 0.5),
        ("character", "bytes_per_token", math.nan),
        ("character", "bytes_per_token", 4.5),
    ],
)
def test_a_sidecar_with_a_wrong_value_is_refused(tmp_path, texts, unit, key, value):
    path = tmp_path / "tokens"
    data.prepare(texts, path, unit)
    change_sidecar(path, **{key: value})
    said = refusal(data.load, f"memmap:{path}", unit)
    assert said.startswith(f"{path}.json: ")
    assert said.endswith(": run seqscale prepare again")
    # The unit, the alphabet and the size of the vocabulary depend on each other.
    linked = {"unit", "alphabet", "vocab_size"}
    assert any(f"{name} is " in said for name in (linked if key in linked else {key}))


def test_an_alphabet_with_a_character_twice_is_refused(tmp_path, texts):
    path = tmp_path / "tokens"
    alphabet = data.prepare(texts, path, "character").alphabet
    change_sidecar(path, alphabet=alphabet[0] + alphabet[:-1])
    assert "tokens.json: alphabet is" in refusal(data.load, f"memmap:{path}", "character")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a table"),
        (b'{"schema": 2}', "schema 2, this version reads 1"),
        (None, "not there"),
    ],
)
def test_a_sidecar_that_is_none_is_refused(tmp_path, texts, content, fault):
    path, sidecar = tmp_path / "tokens", tmp_path / "tokens.json"
    data.prepare(texts, path)
    sidecar.unlink()
    if content is not None:
        sidecar.write_bytes(content)
    assert damage_of(path) == f"{sidecar}: {fault}"


# Hugging Face


class Rows(list):
    """What `datasets.load_dataset` gives, as far as it is used."""

    @property
    def column_names(self):
        return list(self[0])


def offer(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_rows_of_a_data_set_are_documents(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return Rows({"text": None if n == 3 else f"row {n} é"} for n in range(100))

    offer(monkeypatch, load_dataset)
    found = data.load("hf:owner/name")
    assert data.load("hf:owner/name:small", "character").alphabet == "\0 0123456789orwé"
    assert asked == [
        (("owner/name", None), {"split": "train"}),
        (("owner/name", "small"), {"split": "train"}),
    ]
    parts = [documents_of(s) for s in (found.train, found.validation)]
    rows = [b"" if n == 3 else f"row {n} é".encode() for n in range(100)]
    held_out = [n for n in range(100) if hashlib.sha256(str(n).encode()).digest()[0] % 16 == 0]
    assert parts[1] == [rows[n] for n in held_out]
    assert parts[0] == [row for n, row in enumerate(rows) if n not in held_out]
    assert found.documents == 100


def test_a_data_set_without_text_is_refused(monkeypatch):
    offer(monkeypatch, lambda *_, **__: Rows([{"prompt": "a", "answer": "b"}]))
    assert refusal(data.load, "hf:x") == (
        "hf:x: no column text among prompt, answer: give a data set or a CONFIG that has one"
    )
    offer(monkeypatch, lambda *_, **__: Rows([{"text": ["a", "b"]}]))
    assert refusal(data.load, "hf:x") == (
        "hf:x: column text holds list: give a data set or a CONFIG whose column text is text"
    )


def test_without_the_package_datasets_the_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    assert refusal(data.load, "hf:x") == (
        "hf: needs the package datasets: pip install 'seqscale[hf]'"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach 'x' on the Hub\nmore"), "Couldn't reach 'x' on the Hub"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_no_network_is_one_line(monkeypatch, error, said):
    def load_dataset(*_, **__):
        raise error

    offer(monkeypatch, load_dataset)
    assert refusal(data.load, "hf:x") == f"hf:x: {said}: check the name and the network"
