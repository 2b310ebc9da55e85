"""The rules between the sections: what a pipeline does not go with. (Those of other sections: ``test_root.py``.)"""

from typing import Any

import pytest

from megatron_sgt.config import parse_config
from megatron_sgt.errors import ConfigError
from tests.helpers.runs import TINY


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"pipeline_model_parallel_layout": "Et|tL"}, "has no effect with pipeline_model_parallel_size 1"),
        ({"pipeline_model_parallel_size": 99}, "pipeline_model_parallel_size: 99 needs a layer for each part"),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "1,9"},
            r"pipeline_model_parallel_layout: '1,9': its parts hold 1 \+ 9 = 10 layers",
        ),
    ],
)
def test_a_pipeline_that_does_not_fit(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config({**TINY, "model": {**TINY["model"], "vocab_size": 64}, "parallel": given})
