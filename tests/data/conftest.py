"""Small tokenizers and data sets that the tests of this folder share."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sgt.config import Config, parse_config
from megatron_sgt.data.train_tokenizer import train_tokenizer

WORDS = (
    "growth",
    "layer",
    "head",
    "entropy",
    "window",
    "token",
    "sparse",
    "loop",
    "attention",
    "score",
    "gate",
    "depth",
    "model",
    "step",
)


def make_text(rng: random.Random, num_words: int) -> str:
    words = [rng.choice(WORDS) for _ in range(num_words)]
    return " ".join(words) + rng.choice(["\n", ".\n\n", "\n\tend  \r\n", " é漢😀"])


@pytest.fixture(scope="session")
def texts() -> list[str]:
    rng = random.Random(0)
    return [make_text(rng, rng.randint(1, 60)) for _ in range(300)]


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8", newline="")
    train_tokenizer([str(folder)], str(folder / "sp.model"), vocab_size=320)
    return str(folder / "sp.model")


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """Builds a configuration: ``make_config(data_path, seq_length=…, **{"section.key": value})``."""

    def build(data_path: object, seq_length: int = 16, **overrides: object) -> Config:
        values: dict[str, dict[str, object]] = {
            "model": {
                "num_layers": 4, "hidden_size": 32, "num_attention_heads": 2,
                "seq_length": seq_length, "vocab_size": 1000,
            },
            "optim": {"lr": 1e-3},
            "train": {"train_iters": 10, "micro_batch_size": 2, "global_batch_size": 8},
            "data": {"data_path": data_path, "split": "90,10,0"},
            "logging": {"run_dir": str(tmp_path / "run")},
        }  # fmt: skip
        for key, value in overrides.items():
            section, name = key.split(".")
            values[section][name] = value
        return parse_config(values)

    return build
