import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from harness import tasks
from harness.tasks import IGNORE, TASKS

# The values of Zoology, of MAD's baselines and of Mamba.
DEFAULTS = {
    "mqar": {"vocab_size": 8192, "pairs": 4, "power": 0.01, "random_fill": True},
    "in-context-recall": {"vocab_size": 16},
    "fuzzy-recall": {"vocab_size": 16, "key_motif": 3, "value_motif": 3},
    "noisy-recall": {"vocab_size": 32, "noise_vocab_size": 16, "noise_share": 0.2},
    "selective-copying": {"vocab_size": 16, "tokens": 16},
    "compression": {"vocab_size": 16},
    "memorisation": {"vocab_size": 256},
    "induction-heads": {"vocab_size": 16},
    "parity": {},
}


def draw(task, seq_len, count, chosen=None, seed=0, **keywords):
    generator = torch.Generator().manual_seed(seed)
    return tasks.examples(task, seq_len, count, generator, chosen or {}, **keywords)


def answers(found):
    return found.targets[found.targets != IGNORE]


# Oracles answer from the inputs up to a position; those of memorisation know the facts as well.


def recall_mqar(prefix, chosen, facts):
    return prefix[prefix.index(prefix[-1]) + 1]


def recall_pair(prefix, chosen, facts):
    told = dict(zip(prefix[0:-1:2], prefix[1::2], strict=False))
    return told[prefix[-1]]


def recall_motif(prefix, chosen, facts):
    *before, (key, value) = motifs(prefix, chosen)
    return dict(before)[key][len(value)]


def copy(prefix, chosen, facts):
    blank, sign = chosen["vocab_size"] - 2, chosen["vocab_size"] - 1
    at = prefix.index(sign)
    return [token for token in prefix[:at] if token != blank][len(prefix) - at - 2]


def remember(prefix, chosen, facts):
    return facts[prefix[-2]]


def induce(prefix, chosen, facts):
    return prefix[prefix.index(prefix[-1]) + 1]


def count_ones(prefix, chosen, facts):
    return prefix.count(1) % 2


ORACLES = {
    "mqar": recall_mqar,
    "in-context-recall": recall_pair,
    "fuzzy-recall": recall_motif,
    "noisy-recall": recall_pair,
    "selective-copying": copy,
    "memorisation": remember,
    "induction-heads": induce,
    "parity": count_ones,
}


def motifs(row, chosen):
    """Pairs of tuples: the runs of key tokens, each with the run of value tokens after it."""
    keys, padding = (chosen["vocab_size"] - 1) // 2, chosen["vocab_size"] - 1
    found, was_key = [], False
    for token in row[sum(token == padding for token in row) :]:
        is_key = token < keys
        if is_key and not was_key:
            found.append(((), ()))
        key, value = found[-1]
        found[-1] = ((*key, token), value) if is_key else (key, (*value, token))
        was_key = is_key
    return found


def repeated_keys(row, chosen):
    keys = (chosen["vocab_size"] - chosen.get("noise_vocab_size", 0)) // 2
    return {t for t in range(0, len(row), 2) if row[t] < keys and row[t] in row[0:t:2]}


def repeated_motifs(row, chosen):
    pairs = motifs(row, chosen)
    start, seen, found = len(row) - sum(len(k) + len(v) for k, v in pairs), set(), set()
    for number, (key, value) in enumerate(pairs):
        last = number == len(pairs) - 1  # its value goes on beyond the end
        start += len(key)
        if key in seen:
            found |= set(range(start - 1, start + len(value) - (not last)))
        start += len(value)
        seen.add(key)
    assert start == len(row)
    return found


# Where a row of inputs must be asked; None: all that is known is how often.
QUESTIONS = {
    "mqar": lambda row, c: None,
    "in-context-recall": repeated_keys,
    "fuzzy-recall": repeated_motifs,
    "noisy-recall": repeated_keys,
    "selective-copying": lambda row, c: set(range(len(row) - c["tokens"], len(row))),
    "compression": lambda row, c: set(range(len(row) - 1)),
    "memorisation": lambda row, c: set(range(1, len(row), 2)),
    "induction-heads": lambda row, c: {len(row) - 1},
    "parity": lambda row, c: set(range(len(row))),
}


@st.composite
def cases(draw_one, task):
    def whole(low, high):
        return draw_one(st.integers(low, high))

    chosen, shortest = {}, {"parity": 1, "compression": 2, "memorisation": 2}.get(task, 3)
    if task == "mqar":
        pairs = whole(1, 12)
        power = draw_one(st.sampled_from([0.01, 0.5, 1.0, 2.5, 1000.0]))
        chosen = {"pairs": pairs, "power": power, "random_fill": draw_one(st.booleans())}
        chosen["vocab_size"], shortest = whole(2 * pairs + 2, 60), 4 * pairs
    elif task in ("in-context-recall", "compression", "induction-heads"):
        chosen = {"vocab_size": whole(4, 40)}
    elif task == "noisy-recall":
        noise = whole(1, 20)
        chosen = {"noise_vocab_size": noise, "vocab_size": whole(noise + 4, noise + 20)}
        chosen["noise_share"] = draw_one(st.floats(0, 1, exclude_max=True))
    elif task == "fuzzy-recall":
        key, value = whole(1, 4), whole(1, 4)
        chosen = {"key_motif": key, "value_motif": value, "vocab_size": whole(9, 24)}
        shortest = 2 * (key + value) - 1
    elif task == "selective-copying":
        chosen = {"tokens": whole(1, 12), "vocab_size": whole(4, 30)}
        shortest = 2 * chosen["tokens"] + 2
    elif task == "memorisation":
        chosen = {"vocab_size": whole(5, 40)}
    return chosen, shortest + whole(0, 40), whole(0, 1 << 40)


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_asked_follows_from_what_was_read(task, data):
    chosen, seq_len, seed = data.draw(cases(task))
    inputs, targets = draw(task, seq_len, 5, chosen, seed, facts_seed=3)
    assert inputs.shape == targets.shape == (5, seq_len)
    assert inputs.dtype == targets.dtype == torch.int64
    vocabulary = tasks.vocab_size(task, chosen)
    assert inputs.min() >= 0
    assert max(inputs.max(), targets.max()) < vocabulary
    facts = {}
    if task == "memorisation":
        known = draw(task, 8, 500, chosen, seed + 1, facts_seed=3)
        told = known.targets[:, 1::2].flatten()
        facts = dict(zip(known.inputs[:, ::2].flatten().tolist(), told.tolist(), strict=True))
    for row, asked in zip(inputs.tolist(), targets.tolist(), strict=True):
        where = [t for t in range(seq_len) if asked[t] != IGNORE]
        must = QUESTIONS[task](row, chosen)
        assert must is None or set(where) == must
        assert where
        for t in where:
            if task == "compression":  # whose decoder is told the position
                assert asked[t] == row[t]
            else:
                assert asked[t] == ORACLES[task](row[: t + 1], chosen, facts)


@settings(max_examples=60, deadline=None)
@given(case=cases("mqar"))
def test_mqar_asks_for_every_key_once_and_shows_it_nowhere_else(case):
    chosen, seq_len, seed = case
    told = 2 * chosen["pairs"]
    inputs, targets = draw("mqar", seq_len, 5, chosen, seed)
    for row, asked in zip(inputs.tolist(), targets.tolist(), strict=True):
        keys, values = row[0:told:2], row[1:told:2]
        assert len(set(keys)) == len(set(values)) == chosen["pairs"]
        assert 1 <= min(keys) <= max(keys) < chosen["vocab_size"] // 2 <= min(values)
        queries = [t for t, value in enumerate(asked) if value != IGNORE]
        assert sorted(row[t] for t in queries) == sorted(keys)
        assert all(t >= told and (t - told) % 2 == 0 for t in queries)
        fillers = [row[t] for t in range(told, seq_len) if t not in queries]
        assert not set(fillers) & set(keys)
        assert chosen["random_fill"] or not any(fillers)


def test_mqar_fills_with_all_other_tokens_alike_and_does_not_show_the_answer():
    inputs, targets = draw("mqar", 17, 12_000, {"vocab_size": 16, "pairs": 4})
    free = np.ones(16)
    free[1:8] = 3 / 7  # of seven possible keys four are taken
    counts = torch.bincount(inputs[:, -1], minlength=16)  # never a query: independent fillers
    assert chisquare(counts, free * 1000).pvalue > 1e-4
    asked = targets[:, :-1] != IGNORE
    shown = inputs[:, 1:][asked] == targets[:, :-1][asked]
    assert shown.float().mean().item() == pytest.approx(1 / 12, abs=0.007)


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0, 3.0])
def test_mqar_queries_stand_at_gaps_of_the_papers_power_law(power):
    count, pairs, slots = 20_000, 3, 8
    inputs, targets = draw(
        "mqar", 2 * pairs + 2 * slots, count, {"power": power, "pairs": pairs, "vocab_size": 12}
    )
    weights = power * np.arange(1, slots + 1) ** (power - 1)
    weights /= weights.sum()
    queries = targets[:, 2 * pairs :: 2] != IGNORE
    for number in range(2):
        held = queries & (inputs[:, 2 * pairs :: 2] == inputs[:, 2 * number, None])
        seen = held.sum(0).numpy()
        assert seen.sum() == count
        expected = weights
        if number == 1:  # drawn from what the first key left
            after = weights / (1 - weights[:, None])
            np.fill_diagonal(after, 0)
            expected = weights @ after
        assert chisquare(seen, expected * count).pvalue > 1e-4


def test_mqar_queries_are_nearer_for_smaller_powers():
    means = []
    for power in (0.01, 0.5, 1.0, 2.0):
        _, targets = draw("mqar", 128, 500, {"power": power})
        means.append((targets != IGNORE).nonzero()[:, 1].double().mean().item())
    assert means == sorted(means)
    assert means[0] < 40
    assert means[2] == pytest.approx(8 + 59, abs=4)  # uniform: half of the 60 slots, each of two


def test_in_context_recall_gives_each_sequence_a_map_of_its_own():
    inputs, _ = draw("in-context-recall", 128, 2000)
    keys, values = inputs[:, ::2], inputs[:, 1::2]
    assert keys.max() == 7
    assert (values.min(), values.max()) == (8, 15)
    assert chisquare(torch.bincount(keys[:, :-1].flatten())).pvalue > 1e-4
    rows = zip(keys.tolist(), values.tolist(), strict=True)
    maps = [dict(zip(key, value, strict=True)) for key, value in rows]
    assert len({tuple(sorted(one.items())) for one in maps}) > 1990
    first = Counter(one[0] for one in maps if 0 in one)
    assert chisquare(list(first.values())).pvalue > 1e-4
    shared = sum(len(set(one.values())) < len(one) for one in maps)
    assert shared > 1900  # 8 keys draw 8 values with replacement: none shared in 1 of 416


def test_the_last_key_of_in_context_recall_is_any_that_was_seen():
    inputs, targets = draw("in-context-recall", 9, 6000, {"vocab_size": 8})
    assert (targets[:, -1] != IGNORE).all()
    rows = [row for row in inputs.tolist() if row[0] == row[2] == row[4] != row[6]]
    last = Counter(row[8] == row[6] for row in rows)
    assert len(rows) > 200
    # Of two keys each alike, however often they were shown.
    assert chisquare([last[True], last[False]]).pvalue > 1e-4


@pytest.mark.parametrize("share", [0.0, 0.2, 0.8])
def test_noise_is_a_share_of_the_pairs_and_has_tokens_of_its_own(share):
    pairs = 64
    inputs, targets = draw("noisy-recall", 2 * pairs, 1000, {"noise_share": share})
    noisy = inputs >= 16
    assert torch.equal(noisy[:, ::2], noisy[:, 1::2])
    expected = share * (pairs - 2) / pairs  # the last and one other are none
    assert noisy.float().mean().item() == pytest.approx(expected, abs=0.01)
    assert not noisy[:, -2:].any()
    assert (targets[:, -2] != IGNORE).all()
    if share:
        assert chisquare(torch.bincount(inputs[noisy] - 16)).pvalue > 1e-4
    assert set(inputs[~noisy].tolist()) == set(range(16))


def test_a_sequence_of_nothing_but_noise_keeps_one_pair_and_asks_for_it():
    inputs, targets = draw("noisy-recall", 20, 500, {"noise_share": 1 - 1e-9})
    kept = inputs[:, :-2:2] < 16
    assert (kept.sum(1) == 1).all()
    assert torch.equal(inputs[:, :-2:2][kept], inputs[:, -2])
    assert (kept.sum(0) > 20).all()
    assert ((targets != IGNORE).sum(1) == 1).all()


def test_fuzzy_keys_and_values_have_all_lengths_alike_and_tokens_once():
    inputs, _ = draw("fuzzy-recall", 128, 1000)
    keys, values = {}, {}
    for number, row in enumerate(inputs.tolist()):
        pairs = motifs(row, DEFAULTS["fuzzy-recall"])
        padding = row.count(15)
        assert all(token == 15 for token in row[:padding])
        assert padding < 2 * 6
        for place, (key, value) in enumerate(pairs[:-1]):
            assert len(set(key)) == len(key) <= 3
            assert len(set(value)) == len(value) <= 3
            assert values.setdefault((number, key), value) == value
            keys[number, place] = key
    first = [keys[number, 0] for number in range(1000)]
    assert chisquare(list(Counter(map(len, first)).values())).pvalue > 1e-4
    lengths = Counter(len(values[number, key]) for number, key in enumerate(first))
    assert len(lengths) == 3
    assert chisquare(list(lengths.values())).pvalue > 1e-4
    singles = Counter(key for key in keys.values() if len(key) == 1)
    assert len(singles) == 7
    # The same in one sequence are not independent of their number: only a coarse check.
    assert max(singles.values()) < 1.1 * min(singles.values())
    assert len({key for key in keys.values() if len(key) == 3}) == 7 * 6 * 5


def test_the_last_fuzzy_key_repeats_one_from_anywhere_in_the_sequence():
    inputs, targets = draw("fuzzy-recall", 128, 1000)
    assert (targets[:, -1] != IGNORE).all()
    places = []
    for row in inputs.tolist():
        *before, (key, _) = motifs(row, DEFAULTS["fuzzy-recall"])
        found = [number for number, (other, _) in enumerate(before) if other == key]
        if len(found) == 1:
            places.append(found[0] / (len(before) - 1))
    assert len(places) > 500
    assert chisquare(np.histogram(places, 4, range=(0, 1))[0]).pvalue > 1e-4


def test_selective_copying_scatters_blanks_before_the_tokens():
    inputs, _ = draw("selective-copying", 50, 4000, {"tokens": 4, "vocab_size": 6})
    blanks, blank, sign = 50 - 9, 4, 5
    assert (inputs[:, 45] == sign).all()
    assert (inputs[:, 46:] == blank).all()
    held = inputs[:, :45] < blank
    assert (held.sum(1) == 4).all()
    assert held[:, 44].all()
    at = held.nonzero()[:, 1].view(-1, 4)
    gaps = torch.diff(at, dim=1, prepend=torch.full((4000, 1), -1)) - 1
    assert (gaps.sum(1) == blanks).all()
    # Each blank goes before any of the four: binomial.
    assert torch.allclose(gaps.double().mean(0), torch.tensor(blanks / 4).double(), atol=0.3)
    assert torch.allclose(gaps.double().var(0), torch.tensor(blanks * 3 / 16).double(), rtol=0.15)


def test_the_special_token_of_induction_heads_stands_twice_anywhere():
    inputs, targets = draw("induction-heads", 12, 4000)
    special = inputs == 15
    assert (special.sum(1) == 2).all()
    assert special[:, -1].all()
    assert not special[:, -2].any()
    assert chisquare(special[:, :10].sum(0)).pvalue > 1e-4
    assert chisquare(torch.bincount(inputs[~special])).pvalue > 1e-4
    assert ((targets != IGNORE).sum(1) == 1).all()


def test_facts_are_fixed_by_their_seed_alone_and_never_shown():
    def facts(seed, facts_seed):
        inputs, targets = draw("memorisation", 32, 400, seed=seed, facts_seed=facts_seed)
        keys, values = inputs[:, ::2].flatten().tolist(), targets[:, 1::2].flatten().tolist()
        found = dict(zip(keys, values, strict=True))
        assert all(found[key] == value for key, value in zip(keys, values, strict=True))
        assert sorted(found) == list(range(127))
        assert set(inputs[:, 1::2].flatten().tolist()) == {255}
        return found

    one = facts(0, 0)
    assert len(set(one.values())) == 127  # no two keys share a value
    assert set(one.values()) < set(range(127, 255))
    assert one == facts(1, 0)
    assert one != facts(0, 1)
    defaulted = draw("memorisation", 32, 4)
    assert torch.equal(defaulted.targets, draw("memorisation", 32, 4, facts_seed=0).targets)


@pytest.mark.parametrize("task", TASKS)
def test_a_constant_guess_is_right_by_chance(task):
    chosen = {"vocab_size": 32, "pairs": 8} if task == "mqar" else {}
    count = 4000
    asked = answers(draw(task, 64, count, chosen))
    rates = torch.bincount(asked).double() / len(asked)
    expected = tasks.chance(task, chosen)
    possible = rates[rates > 0]
    assert len(possible) == round(1 / expected)
    # What is asked within a sequence is not independent: a sequence counts as one draw.
    noise = 5 * math.sqrt(expected / count)
    assert possible.max().item() == pytest.approx(expected, abs=noise)
    assert possible.min().item() == pytest.approx(expected, abs=noise)


@pytest.mark.parametrize(
    ("task", "tokens", "values"),
    [
        ("mqar", 8192, 4096),
        ("in-context-recall", 16, 8),
        ("fuzzy-recall", 16, 8),
        ("noisy-recall", 32, 8),
        ("selective-copying", 16, 14),
        ("compression", 16, 15),
        ("memorisation", 256, 127),
        ("induction-heads", 16, 15),
        ("parity", 2, 2),
    ],
)
def test_defaults_are_the_papers(task, tokens, values):
    assert tasks.checked(task, 64, {}) == DEFAULTS[task]
    assert tasks.vocab_size(task, {}) == tokens
    assert tasks.chance(task, {}) == 1 / values


def test_settings_replace_defaults_and_whole_numbers_do_for_others():
    assert set(TASKS) == set(DEFAULTS)
    whole = tasks.checked("mqar", 64, {"power": 1, "pairs": 2})
    assert whole == DEFAULTS["mqar"] | {"power": 1.0, "pairs": 2}
    assert isinstance(whole["power"], float)
    assert tasks.vocab_size("mqar", {"vocab_size": 50}) == 50
    assert tasks.chance("mqar", {"vocab_size": 51}) == 1 / 26
    assert tasks.chance("in-context-recall", {"vocab_size": 5}) == 1 / 3
    assert tasks.chance("noisy-recall", {"vocab_size": 21}) == 1 / 3
    assert tasks.chance("fuzzy-recall", {"vocab_size": 8}) == 1 / 4


def test_only_compression_has_a_decoder_of_its_own():
    assert {name for name, task in TASKS.items() if task.decoder != "next-token"} == {"compression"}
    assert TASKS["compression"].decoder == "position-mlp"
    inputs, targets = draw("compression", 32, 50)
    assert (inputs[:, -1] == 15).all()
    assert (targets[:, -1] == IGNORE).all()
    assert (inputs[:, :-1] < 15).all()


@pytest.mark.parametrize("task", TASKS)
def test_the_generator_decides_and_moves_on(task):
    generator = torch.Generator().manual_seed(5)
    first, second = (tasks.examples(task, 64, 3, generator, {}) for _ in range(2))
    again, other = draw(task, 64, 3, seed=5), draw(task, 64, 3, seed=6)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs, second.inputs)
    assert not torch.equal(first.inputs, other.inputs)
    for found in (first, second):
        assert len(found.inputs.unique(dim=0)) == 3


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for task in TASKS:
        draw(task, 64, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("task", "seq_len", "chosen", "line"),
    [
        ("mqra", 64, {}, "unknown task 'mqra', expected one of .*did you mean 'mqar'"),
        (
            "mqar",
            64,
            {"pair": 3},
            "mqar: unknown setting 'pair', expected one of vocab_size, pairs, power, random_fill; "
            "did you mean 'pairs'",
        ),
        ("parity", 64, {"vocab_size": 2}, "parity has no settings: leave out 'vocab_size'"),
        ("mqar", 64, {"pairs": "4"}, "mqar: pairs must be a whole number, got '4'"),
        ("mqar", 64, {"pairs": 4.0}, "mqar: pairs must be a whole number, got 4.0"),
        ("mqar", 64, {"pairs": True}, "mqar: pairs must be a whole number, got True"),
        ("mqar", 64, {"power": "1"}, "mqar: power must be a number, got '1'"),
        ("mqar", 64, {"power": False}, "mqar: power must be a number, got False"),
        ("mqar", 64, {"random_fill": 1}, "mqar: random_fill must be true or false, got 1"),
        ("mqar", 64, {"power": 0.0}, "mqar: power must be positive and finite, got 0.0"),
        ("mqar", 64, {"power": math.inf}, "mqar: power must be positive and finite, got inf"),
        ("mqar", 64, {"power": math.nan}, "mqar: power must be positive and finite, got nan"),
        ("mqar", 64, {"pairs": 0}, "mqar: pairs must be at least 1, got 0"),
        ("mqar", 64, {"vocab_size": 9}, "mqar: vocab_size must be at least 10, got 9"),
        ("mqar", 15, {}, r"mqar: seq_len must be a whole number >= 4 \* pairs = 16, got 15"),
        ("parity", 0, {}, "parity: seq_len must be a whole number >= 1, got 0"),
        ("parity", True, {}, "parity: seq_len must be a whole number >= 1, got True"),
        ("parity", 8.0, {}, "parity: seq_len must be a whole number >= 1, got 8.0"),
        ("in-context-recall", 2, {}, "in-context-recall: seq_len must be .* >= 3, got 2"),
        ("in-context-recall", 9, {"vocab_size": 3}, "vocab_size must be at least 4, got 3"),
        ("noisy-recall", 2, {}, "noisy-recall: seq_len must be .* >= 3, got 2"),
        ("noisy-recall", 9, {"vocab_size": 19}, "vocab_size must be at least 20, got 19"),
        ("noisy-recall", 9, {"noise_vocab_size": 0}, "noise_vocab_size must be at least 1, got 0"),
        ("noisy-recall", 9, {"noise_share": 1}, "noise_share must be at least 0 and below 1, got"),
        ("noisy-recall", 9, {"noise_share": -0.1}, "noise_share must be .*, got -0.1"),
        (
            "fuzzy-recall",
            10,
            {},
            r"seq_len must be .* >= 2 \* \(key_motif \+ value_motif\) - 1 = 11, got 10",
        ),
        ("fuzzy-recall", 20, {"key_motif": 0}, "key_motif must be at least 1, got 0"),
        ("fuzzy-recall", 20, {"value_motif": 0}, "value_motif must be at least 1, got 0"),
        ("fuzzy-recall", 20, {"vocab_size": 6}, "vocab_size must be at least 7, got 6"),
        (
            "fuzzy-recall",
            20,
            {"vocab_size": 8, "value_motif": 5},
            "vocab_size must be at least 10, got 8",
        ),
        (
            "fuzzy-recall",
            20,
            {"vocab_size": 8192, "key_motif": 6},
            "fuzzy-recall: lower key_motif = 6, or vocab_size",
        ),
        ("selective-copying", 33, {}, r"seq_len must be .* >= 2 \* tokens \+ 2 = 34, got"),
        ("selective-copying", 33, {"tokens": 0}, "tokens must be at least 1, got 0"),
        ("selective-copying", 33, {"vocab_size": 3}, "vocab_size must be at least 4, got 3"),
        ("compression", 1, {}, "compression: seq_len must be .* >= 2, got 1"),
        ("compression", 8, {"vocab_size": 2}, "vocab_size must be at least 3, got 2"),
        ("memorisation", 1, {}, "memorisation: seq_len must be .* >= 2, got 1"),
        ("memorisation", 8, {"vocab_size": 4}, "vocab_size must be at least 5, got 4"),
        ("induction-heads", 2, {}, "induction-heads: seq_len must be .* >= 3, got 2"),
        ("induction-heads", 8, {"vocab_size": 2}, "vocab_size must be at least 3, got 2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(task, seq_len, chosen, line):
    for call in (tasks.checked, lambda *given: draw(given[0], given[1], 2, given[2])):
        with pytest.raises(ValueError, match=line) as caught:
            call(task, seq_len, chosen)
        assert "\n" not in str(caught.value)
    if "seq_len" not in line:
        for call in (tasks.vocab_size, tasks.chance):
            with pytest.raises(ValueError, match=line):
                call(task, chosen)


def test_the_least_that_is_allowed_works():
    least = {
        "mqar": (16, {"vocab_size": 10}),
        "in-context-recall": (3, {"vocab_size": 4}),
        "noisy-recall": (3, {"vocab_size": 5, "noise_vocab_size": 1}),
        "fuzzy-recall": (11, {"vocab_size": 7}),
        "selective-copying": (34, {"vocab_size": 4}),
        "compression": (2, {"vocab_size": 3}),
        "memorisation": (2, {"vocab_size": 5}),
        "induction-heads": (3, {"vocab_size": 3}),
        "parity": (1, {}),
    }
    for task, (seq_len, chosen) in least.items():
        assert len(answers(draw(task, seq_len, 50, chosen))) >= 50


def test_at_least_one_example_is_drawn():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        draw("parity", 8, 0)
    assert draw("parity", 8, 1).inputs.shape == (1, 8)
