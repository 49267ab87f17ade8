import math

import pytest

import archs
from harness import sizes


@pytest.mark.parametrize("target", [300_000, 1_000_000, 5_000_000, 30_000_000, 130_000_000])
def test_matched_models_have_the_parameters_they_say(target):
    matches = sizes.match_sizes(target)
    assert set(matches) == set(sizes.SCALING)
    for arch, match in matches.items():
        assert abs(match.residual) <= 0.01
        assert match.params == pytest.approx(target * (1 + match.residual), abs=1)
        shape = match.shape
        if target <= 5_000_000:
            model = archs.build_model(
                arch, width=shape.width, depth=shape.depth, options={arch: shape.fields}
            )
            assert sum(p.numel() for p in model.parameters()) == match.params
        print(f"{arch:12s} {target:>11,} {match}")


def test_larger_vocabularies_count():
    small, large = (sizes.match_sizes(5_000_000, ["hyena"], vocab_size=v) for v in (256, 8192))
    assert large["hyena"].shape != small["hyena"].shape
    assert abs(large["hyena"].residual) <= 0.01


@pytest.mark.parametrize("arch", sizes.SCALING)
def test_proportions_stay_near_the_customary_ones(arch):
    row = sizes.SCALING[arch]
    shape = sizes.match_sizes(130_000_000, [arch])[arch].shape
    assert abs(math.log(shape.width / shape.depth / row.aspect)) < 0.5
    if row.mlp_ratio is not None:
        assert 0.6 < shape.fields["mlp_width"] / shape.width / row.mlp_ratio < 1.6


def test_impossible_targets_and_unknown_rows_are_refused():
    with pytest.raises(ValueError, match="choose another size"):
        sizes.match_sizes(3_000, ["mamba2"])
    with pytest.raises(ValueError, match="give a width"):
        sizes.match_sizes(1_000_000, ["mamba2+hyena"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("d256", ("width", 256)),
        ("d256h128", ("width", 256)),
        ("1M", ("params", 1_000_000)),
        ("2.5M", ("params", 2_500_000)),
        ("340K", ("params", 340_000)),
        ("1.3B", ("params", 1_300_000_000)),
    ],
)
def test_sizes_are_read(text, expected):
    assert sizes.parse_size(text) == expected


@pytest.mark.parametrize("text", ["256", "d0", "d", "d256h", "d256h0", "h64", "M", "1m", "1e6", ""])
def test_unknown_sizes_name_the_fix(text):
    with pytest.raises(ValueError, match="write d256"):
        sizes.parse_size(text)


def test_a_width_may_come_with_heads():
    assert sizes.shape_of("transformer", "d256") == sizes.Shape(256, 2)
    assert sizes.shape_of("transformer", "d256h128") == sizes.Shape(256, 2, {"head_dim": 128})
