from pathlib import Path

import pytest
from soak_parts.ranks import RANKS
from soak_parts.workload import LAYOUTS, SAVES, small_config, write_data

from megatron_sgt.data.sources import validate_data


@pytest.mark.parametrize("saves", SAVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_a_run(layout: str, saves: str, tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", write_data(tmp_path), LAYOUTS[layout], {"save_interval": 4} | SAVES[saves])
    assert config.num_micro_batches(RANKS) >= 1
    assert validate_data(config).train_samples > 0
