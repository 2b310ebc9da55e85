import pytest

from megatron_sgt.config import Config
from megatron_sgt.planning.kept import kept_steps, kept_text, milestones, saved_steps
from tests.helpers.single import small_config


def run_of(steps: int, interval: int, last: int = 2, every: int | None = None) -> Config:
    checkpoint = {"save_interval": interval, "keep_last": last, "keep_every": every}
    return small_config(train={"train_iters": steps}, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("config", "every", "kept"),
    [
        (run_of(1000, 10), 100, [*range(100, 1001, 100), 990]),
        (run_of(1000, 300), 300, [300, 600, 900]),
        (run_of(1005, 10), 110, [*range(110, 1000, 110), 1000]),
        (run_of(40, 1, every=0), 0, [39, 40]),
        (run_of(40, 4, every=10), 10, [20, 36, 40]),
        (run_of(40, 0), 0, [40]),
        (run_of(40, 20, last=0), 20, [20, 40]),
    ],
)
def test_milestones_are_at_most_ten(config: Config, every: int, kept: list[int]) -> None:
    assert config.milestone_interval == every
    assert kept_steps(config) == sorted(kept)
    assert milestones(config) == len([step for step in saved_steps(config) if every and step % every == 0]) <= 10


def test_the_ends_of_stages_stay() -> None:
    config = run_of(40, 8, every=16)
    assert saved_steps(config, [5, 30]) == [5, 8, 16, 24, 30, 32, 40] and kept_steps(config, [5]) == [5, 16, 32, 40]
    assert kept_text(config, 2) == "2 kept, 2 milestones (every 16 steps) and 2 saves between stages"
    assert kept_text(config) == "2 kept and 2 milestones (every 16 steps)"
    assert kept_text(run_of(40, 8, last=0), 1) == "all kept and 1 save between stages"
