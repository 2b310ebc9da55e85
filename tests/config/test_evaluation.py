"""The section of tasks while a run trains."""

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_sgt.config.evaluation import EvaluationConfig


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tasks": ["a", "b", "a"]}, r"tasks: \['a'\] more than once"),
        ({"tasks": ["a", " "]}, "tasks: a name is empty"),
        ({"tasks_interval": 5}, "tasks_interval: 5 has no effect without tasks"),
        ({"num_fewshot": 0}, "num_fewshot: 0 has no effect without tasks"),
    ],
)
def test_what_makes_no_sense(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        EvaluationConfig(**given)
    assert EvaluationConfig(tasks=("a",), limit=5, num_fewshot=0).tasks == ("a",)
