import pytest
import torch

from harness import data


@pytest.fixture(scope="module")
def corpus():
    return data.python_source()


def test_python_source_is_large_real_and_split(corpus):
    assert len(corpus.train) > 10e6
    assert 0.02 < len(corpus.validation) / len(corpus.train) < 0.2
    assert bytes(corpus.train[:200_000].tolist()).count(b"import ") > 10
    assert len(corpus.sha256) == 64


def test_no_document_is_in_both_parts(corpus):
    parts = [bytes(t.numpy()).split(data.SEPARATOR) for t in (corpus.train, corpus.validation)]
    assert len(parts[0]) + len(parts[1]) - 2 == corpus.documents
    long = [{d for d in part if len(d) > 2000} for part in parts]
    assert len(long[1]) > 20
    assert not long[0] & long[1]


def test_batches_are_reproducible_shifted_windows(corpus):
    draws = [corpus.batch(4, 100, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    inputs, targets = draws[0]
    assert inputs.shape == targets.shape == (4, 100)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, draws[1][0])
    assert not torch.equal(inputs, draws[2][0])


def test_validation_batches_come_from_the_other_part(corpus):
    inputs, _ = corpus.batch(2, 300, torch.Generator().manual_seed(0), validation=True)
    text = bytes(corpus.validation.numpy())
    for row in inputs:
        assert bytes(row.tolist()) in text


def test_a_corpus_shorter_than_a_window_is_refused():
    tiny = data.Corpus("tiny", torch.zeros(50, dtype=torch.uint8), torch.zeros(0), "", 1)
    with pytest.raises(ValueError, match="tiny: 50 bytes are too few"):
        tiny.batch(1, 50, torch.Generator())
    assert tiny.batch(1, 49, torch.Generator())[0].shape == (1, 49)
