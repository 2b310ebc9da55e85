"""The YAML dialect of the configuration, against YAML 1.2 and against what is written."""

from typing import Any

import pytest

from megatron_sgt.config.yaml_io import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-4", 6e-4),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("-.inf", float("-inf")),
        ("010", 10),
        ("08", 8),
        ("1_000", 1000),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("no", "no"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("null", None),
        ("~", None),
        ("'6e-4'", "6e-4"),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)
def test_parse(text: str, value: Any) -> None:
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        "6e-4",
        "1e5",
        "on",
        "010",
        "08",
        "true",
        "null",
        "~",
        "12:30",
        "",
        " a",
        "a: b",
        "#",
        "1_0",
        1e-8,
        1e300,
        0.1,
        3.0,
        -7,
        None,
        True,
        {},
        [],
        "ä",
    ],
)
def test_round_trip(value: Any) -> None:
    parsed = parse_yaml(dump_yaml({"key": value}), "test")["key"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_keys_keep_their_order_and_tuples_take_one_line() -> None:
    assert dump_yaml({"b": (1, 2), "a": {"c": "x"}}) == "b: [1, 2]\na:\n  c: x\n"
