"""Reading YAML files: inheritance, overrides, and one clear message for every mistake."""

from pathlib import Path

import pytest

from megatron_sgt.config import load_config, parse_config
from megatron_sgt.errors import ConfigError

YAML = """\
model: {num_layers: 6, hidden_size: 64, num_attention_heads: 4, seq_length: 64, vocab_size: 256}
optim: {lr: 6e-4}
train: {train_iters: 100, micro_batch_size: 2, global_batch_size: 8}
growth:
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def failure(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_load(config_file: Path) -> None:
    cfg = load_config(str(config_file))
    assert (cfg.model.num_layers, cfg.optim.lr, cfg.growth.method) == (6, 6e-4, "sgt")


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("train.train_iters=7", "train.train_iters", 7),
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("growth.exclude_layers=[0, 1]", "growth.exclude_layers", (0, 1)),
        ("logging.progress_bar=on", "logging.progress_bar", "on"),
        ("train.exit_interval=", "train.exit_interval", None),
        ("data.data_path=a=b", "data.data_path", ("a=b",)),
        ("data.tokenizer={type: huggingface, model: x}", "data.tokenizer.model", "x"),
        (
            "deepspeed.zero_optimization.overlap_comm=true",
            "deepspeed",
            {"zero_optimization": {"overlap_comm": True}},
        ),
    ],
)
def test_override(config_file: Path, override: str, read: str, expected: object) -> None:
    value: object = load_config(config_file, [override])
    for name in read.split("."):
        value = getattr(value, name)
    assert value == expected


def test_the_last_override_wins_and_nested_ones_add_up(config_file: Path) -> None:
    overrides = ["train.seed=1", "train.seed=2", "deepspeed.a.b=1", "deepspeed.a.c=2"]
    cfg = load_config(config_file, overrides)
    assert cfg.train.seed == 2
    assert cfg.deepspeed == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.train_iters", "must be section.key=value"),
        ("=5", "must be section.key=value"),
        ("train..x=5", "must be section.key=value"),
        ("optim.lr.x=5", "optim.lr is 0.0006, not a section"),
        ("train.seed=[1", "override 'train.seed=[1', line 1: not valid YAML"),
        ("train=3", "train: must be a mapping, got 3"),
        ("train.seed=abc", "train.seed: must be an integer, got 'abc'"),
    ],
)
def test_bad_override(config_file: Path, override: str, message: str) -> None:
    assert message in failure(config_file, override)


def test_a_single_problem_is_one_line(config_file: Path) -> None:
    line = "unknown key 'model.num_layer'; did you mean 'num_layers'?"
    assert failure(config_file, "model.num_layer=3") == f"{config_file}: {line}"


def test_all_problems_at_once(config_file: Path) -> None:
    message = failure(
        config_file,
        "model.hidden_size=0",
        "train.n_layers=1",
        "optim.lr=x",
        "parallel.context_parallel_size=2",
    )
    assert message.splitlines() == [
        f"{config_file}: 4 problems",
        "  model.hidden_size: must be > 0, got 0",
        "  parallel.context_parallel_size: 2 is not supported, only 1; use tensor_model_parallel_size, zero_stage",
        "  optim.lr: must be a number, got 'x'",
        "  unknown key 'train.n_layers'; did you mean 'model.num_layers'?",
    ]


def test_missing_sections() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({})
    assert str(caught.value).splitlines()[1:] == [
        "  model: is required",
        "  optim: is required",
        "  train: is required",
    ]


class TestBase:
    def test_values_are_overridden_key_by_key(self, config_file: Path) -> None:
        (config_file.parent / "sub").mkdir()
        middle = config_file.parent / "sub" / "middle.yaml"
        middle.write_text("base: ../run.yaml\ngrowth: {window_size: 5}\ndeepspeed: {a: {b: 1, c: 1}}\n")
        top = config_file.parent / "top.yaml"
        top.write_text("base: sub/middle.yaml\ngrowth: {top_k_layers: 2}\ntrain:\ndeepspeed: {a: {b: 2}}\n")
        cfg = load_config(top, ["growth.num_keep_heads=1"])
        growth = cfg.growth
        assert (growth.window_size, growth.top_k_layers, growth.num_keep_heads) == (5, 2, 1)
        assert cfg.train.train_iters == 100
        assert cfg.deepspeed == {"a": {"b": 2, "c": 1}}

    def test_null_replaces_a_value(self, config_file: Path) -> None:
        top = config_file.parent / "top.yaml"
        top.write_text("base: run.yaml\nmodel: {vocab_size: null}\ndata: {tokenizer: {type: huggingface, model: x}}\n")
        assert load_config(top).model.vocab_size is None

    def test_cycle(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("base: b.yaml\n")
        (tmp_path / "b.yaml").write_text("base: a.yaml\n")
        message = failure(tmp_path / "a.yaml")
        assert "goes round in a circle" in message
        assert message.count("a.yaml") == 3

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("base: rum.yaml", "did you mean"),
            ("base: [a]", "must be the path"),
            ("base: run.yaml\nbase: x", "twice"),
        ],
    )
    def test_bad_base(self, config_file: Path, text: str, message: str) -> None:
        top = config_file.parent / "top.yaml"
        top.write_text(text)
        assert message in failure(top)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be a mapping of sections (model:, optim:, train:, ...), holds nothing"),
        ("- 1\n", "holds a list"),
        ("model: {\n", "not valid YAML"),
        ("model: 1\nmodel: 2\n", "line 2: not valid YAML: key 'model' stands twice"),
        ("train:\n  seed: 1\n  seed: 2\n", "line 3: not valid YAML: key 'seed' stands twice"),
        ("1: 2\n", "key '1' is not text"),
        ("model: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_bad_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert message in failure(path)


def test_no_file(config_file: Path) -> None:
    assert failure(config_file.parent / "rnu.yaml").endswith(f"did you mean '{config_file}'?")
    assert "no such file" in failure(config_file.parent / "nowhere" / "x.yaml")
    assert "cannot be read" in failure(config_file.parent)
