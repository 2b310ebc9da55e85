"""Blends and splits as the data section reads them."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_sgt.config import DataConfig


@pytest.mark.parametrize(
    ("data_path", "blend"),
    [
        ((), ()),
        ("runs/x_text_document", ((1.0, "runs/x_text_document"),)),
        (["a"], ((1.0, "a"),)),
        ([1, "a", "3", "b"], ((0.25, "a"), (0.75, "b"))),
        ([0.3, "a", 0.3, "b"], ((0.5, "a"), (0.5, "b"))),
    ],
)
def test_blend(data_path: Any, blend: tuple[tuple[float, str], ...]) -> None:
    assert DataConfig.model_validate({"data_path": data_path}).blend() == blend


@pytest.mark.parametrize(
    "data_path",
    [("a", "b"), (0.5, "a", 0.5), (0, "a", 1, "b"), ("-1", "a"), (float("inf"), "a"), ("nan", "a")],
)
def test_what_is_no_blend(data_path: Any) -> None:
    with pytest.raises(ValidationError, match="is neither one prefix nor a blend"):
        DataConfig(data_path=data_path)


@pytest.mark.parametrize(
    ("split", "shares"),
    [
        ("949,50,1", (0.949, 0.05, 0.001)),
        ("3, 1", (0.75, 0.25, 0.0)),
        ("1", (1.0, 0.0, 0.0)),
        ("1,0,1", (0.5, 0, 0.5)),
    ],
)
def test_split_shares(split: str, shares: tuple[float, ...]) -> None:
    assert DataConfig(split=split).split_shares() == pytest.approx(shares)


@pytest.mark.parametrize("split", ["0,1,0", "1,1,1,1", "most", "", "1,-1,1", "inf", "nan,1,1"])
def test_what_is_no_split(split: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(f"split: '{split}' is not one to three shares")):
        DataConfig(split=split)


def test_validation_sets_have_plain_names() -> None:
    given: dict[str, Any] = {"wiki": "~/wiki", "code_2": "code"}
    home = DataConfig(valid=given).valid["wiki"]
    assert home.endswith("/wiki") and "~" not in home
    for name in ("my set", "2code", "wiki/en", ""):
        with pytest.raises(ValidationError, match=re.escape(f"valid: '{name}' is no plain name")):
            DataConfig(valid={name: "a"})
