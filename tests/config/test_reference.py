"""docs/configuration.md is what the configuration classes say, and says everything."""

from pathlib import Path

from pydantic import BaseModel

from megatron_sgt.config import Config
from megatron_sgt.config.presets import BASELINES
from megatron_sgt.config.reference import reference
from megatron_sgt.stages.presets import GROWING

FILE = Path(__file__).parents[2] / "docs" / "configuration.md"
GROWTH = {name: preset.summary for name, preset in GROWING.items()}


def test_the_file_is_up_to_date() -> None:
    assert FILE.read_text(encoding="utf-8") == reference(GROWTH), "run: python tools/config_reference.py"


def test_every_field_is_described() -> None:
    text = reference(GROWTH)
    for section, field in Config.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            for name, inner in annotation.model_fields.items():
                row = next(line for line in text.splitlines() if line.startswith(f"| `{section}.{name}` |"))
                assert inner.description and " ".join(inner.description.split()).replace("|", "\\|") in row
    assert all(f"| `{name}` |" in text for name in (*BASELINES, *GROWING))


def test_types_bounds_and_defaults() -> None:
    text = reference(GROWTH)
    assert "| `train.train_iters` | integer > 0 | required |" in text
    assert "| `growth.ema_decay` | number ≥ 0 < 1 | `0.5` |" in text
    assert "| `growth.exclude_layers` | list of integers | `[0]` |" in text
    assert "| `data.tokenizer.type` | `sentencepiece`, `huggingface` | required |" in text
    assert "| `checkpoint.load` | path or null | `null` |" in text
