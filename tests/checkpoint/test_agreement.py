"""What one rank cannot do is raised on all; otherwise all know what each has done."""

import pytest

from megatron_sgt.checkpoint.agreement import agreed
from megatron_sgt.errors import CheckpointError
from tests.helpers.deepspeed_files import odd_config
from tests.helpers.fake_groups import fake_groups
from tests.helpers.ranks import run_on_ranks
from tests.helpers.resharding import fail_on_rank_one


def test_the_error_of_one_rank_is_told_on_all() -> None:
    assert run_on_ranks(2, fail_on_rank_one, odd_config()) == ["rank 1 has no room"] * 2


def test_alone() -> None:
    assert agreed(lambda: 7, fake_groups()) == [7]

    def fails() -> None:
        raise CheckpointError("full")

    with pytest.raises(CheckpointError, match=r"^full$"):
        agreed(fails, fake_groups())
