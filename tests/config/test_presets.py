"""A baseline's preset changes the growth section alone, and gives it the settings of the paper."""

from pathlib import Path

import pytest

from megatron_sgt.config import load_config
from megatron_sgt.config.presets import BASELINES, baseline
from megatron_sgt.errors import ConfigError

FILE = Path(__file__).parents[2] / "examples" / "configs" / "sgt_300m.yaml"


def growth(preset: str, *overrides: str) -> dict[str, object]:
    return load_config(FILE, overrides, baseline(preset)).growth.model_dump()


EXPECTED: dict[str, dict[str, object]] = {
    "vanilla": {"method": "vanilla"},
    "sgt": {},
    "sgt-lowest-heads": {"head_choice": "lowest"},
    "sgt-random-heads": {"head_choice": "random"},
    "sgt-all-heads": {"head_choice": "all"},
    "sgt-shallow-first": {"direction": "shallow_to_deep"},
    "block-loop-1": {"method": "block_loop", "block_loop_layers": (12,)},
    "block-loop-3": {"method": "block_loop", "block_loop_layers": (11, 12, 13)},
}


def test_every_preset_is_expected() -> None:
    assert set(EXPECTED) == set(BASELINES)


@pytest.mark.parametrize("name", BASELINES)
def test_differs_in_growth_alone(name: str) -> None:
    plain, changed = load_config(FILE).model_dump(), load_config(FILE, (), baseline(name)).model_dump()
    assert changed["growth"] == {**plain["growth"], **EXPECTED[name]}
    assert changed["logging"].pop("run_dir") == f"{plain['logging'].pop('run_dir')}-{name}"
    del plain["growth"], changed["growth"]
    assert changed == plain


def test_overrides_lie_over_a_preset() -> None:
    layers = growth("block-loop-1", "model.num_layers=8", "growth.exclude_layers=[0]")["block_loop_layers"]
    assert layers == (4,)
    assert growth("block-loop-3", "growth.block_loop_layers=[1, 5]")["block_loop_layers"] == (1, 5)
    assert load_config(FILE, ["logging.run_dir=here"], baseline("sgt")).logging.run_dir == "here"


def test_a_preset_undoes_an_ablation_of_the_file() -> None:
    lowest = FILE.with_name("sgt_300m_lowest_heads.yaml")
    assert load_config(lowest, (), baseline("sgt")).growth == load_config(FILE).growth
    vanilla = load_config(FILE.with_name("block_loop_300m.yaml"), (), baseline("vanilla")).growth
    assert (vanilla.method, vanilla.block_loop_layers) == ("vanilla", ())


def test_models_that_are_too_small() -> None:
    with pytest.raises(ConfigError, match="needs 3 layers, the model has 2"):
        growth("block-loop-3", "model.num_layers=2")
