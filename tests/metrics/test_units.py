"""Tables of numbers and how they read, with the roundings that move a digit or a prefix."""

import math

import pytest

from megatron_sgt.metrics import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.01234, "0.0123"), (1, "1.00"), (9.996, "10.0"), (41.26, "41.3"), (99.96, "100"),
        (418.4, "418"), (1234.6, "1235"), (math.nan, "NaN"), (math.inf, "inf"), (-math.inf, "-inf"),
        (-2.5, "-2.50"),
    ],
)  # fmt: skip
def test_significant(value: float, text: str) -> None:
    assert units.significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (12.3, "12.3"), (999.4, "999"), (999.9, "1.00k"), (48_800, "48.8k"), (1_562_000, "1.56M"),
        (8.6e20, "860E"), (2e22, "20000E"), (math.nan, "NaN"),
    ],
)  # fmt: skip
def test_si(value: float, text: str) -> None:
    assert units.si(value) == text


def test_si_separator_stands_before_a_prefix_only() -> None:
    assert units.si(1_562_000, " ") == "1.56 M"
    assert units.si(12.3, " ") == "12.3"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (5.94e-4, "5.9e-4"),
        (9.96e-5, "1.0e-4"),
        (1.0, "1.0e0"),
        (2.5e12, "2.5e12"),
        (math.nan, "NaN"),
    ],
)
def test_exponent(value: float, text: str) -> None:
    assert units.exponent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(31.13, "31.1"), (999.4, "999"), (999.9, "1,000"), (4096, "4,096"), (1.3e7, "1.3e7"), (math.inf, "inf")],
)
def test_perplexity(value: float, text: str) -> None:
    assert units.perplexity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (41.6, "42s"), (59.6, "1m00s"), (725, "12m05s"), (3599.7, "1h00m"), (60_690, "16h51m"),
        (86_399.9, "1d00h"), (273_700, "3d04h"), (math.inf, "?"), (math.nan, "?"), (-1, "?"),
    ],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (8.06, "8.1 s"), (9.96, "10 s"), (42.2, "42 s"), (59.9, "1m00s")]
)
def test_elapsed(seconds: float, text: str) -> None:
    assert units.elapsed(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(512, "512 B"), (999.6, "1.00 kB"), (8.123e8, "812 MB"), (1.74e10, "17.4 GB")]
)
def test_file_size(size: float, text: str) -> None:
    assert units.file_size(size) == text


def test_flop_rate_changes_unit_below_one_tera() -> None:
    assert units.flop_rate(418.2) == "418 TF"
    assert units.flop_rate(0.0523) == "52.3 GF"


def test_fixed_shows_what_is_no_number() -> None:
    assert units.fixed(3.41249, 3) == "3.412"
    assert [units.fixed(value, 3) for value in (math.nan, math.inf, -math.inf, None)] == [
        "NaN",
        "inf",
        "-inf",
        "n/a",
    ]
    assert units.is_bad(math.nan) and units.is_bad(-math.inf)
    assert not units.is_bad(None) and not units.is_bad(0.0)
