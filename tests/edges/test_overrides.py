"""Settings as people write them on a command line and in a file: nothing of them is dropped or turned in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config import Config, load_config
from megatron_sgt.config.loader import repeated
from megatron_sgt.data.prefix import resolve_prefix
from megatron_sgt.engine.main import parse
from megatron_sgt.errors import ConfigError, DataError
from tests.helpers.commands import run_script
from tests.helpers.datasets import write_dataset

YAML = """\
model: {num_layers: 6, hidden_size: 64, num_attention_heads: 4, seq_length: 64, vocab_size: 256}
optim: {lr: 6e-4}
train: {train_iters: 100, micro_batch_size: 2, global_batch_size: 8}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def setting(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("exp #1", "exp #1"),
        ("exp: 1", "exp: 1"),
        ("- exp", "- exp"),
        ("#1", "#1"),
        ("%exp", "%exp"),
        ("!exp", "!exp"),
        ("*exp", "*exp"),
        ("&exp", "&exp"),
        ("exp, 1", "exp, 1"),
        ("it's", "it's"),
        ("'exp #1'", "exp #1"),
        ('"exp #1"', "exp #1"),
        ("yes", "yes"),
        ("off", "off"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", "0x10"),
        ("a=b", "a=b"),
        ("'1e-4'", "1e-4"),
    ],
)
def test_text_arrives_whole(file: Path, text: str, value: str) -> None:
    assert load_config(file, [f"logging.wandb_project={text}"]).logging.wandb_project == value


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=1e-4", 1e-4),
        ("train.seed=010", 10),
        ("train.seed= 7 ", 7),
        ("train.seed=1_000", 1000),
        ("train.exit_interval=null", None),
        ("train.exit_interval=", None),
        ("growth.exclude_layers=[0, 1]", (0, 1)),
        ("growth.exclude_layers=[]", ()),
    ],
)
def test_numbers_and_lists(file: Path, override: str, value: object) -> None:
    assert setting(load_config(file, [override]), override.partition("=")[0]) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("logging.run_dir='exp' #1", "'#1' stands behind the value; put all of it into quotes"),
        ("data.data_path=[a, b] #1", "'#1' stands behind the value"),
        ("data.data_path=[a #1, b]", "not valid YAML"),
        ("logging.run_dir='exp", "not valid YAML"),
        ("logging.run_dir=exp\n1", "a value of several lines"),
        ("model.qk_layernorm=yes", "must be true or false, got 'yes'"),
        ("train.train_iters=1e3", "must be an integer, got 1000.0; write 1000"),
        ("train.train_iters=0x10", "must be an integer, got '0x10'"),
        ("logging.run_dir=2024", "must be text, got 2024; put it into quotes"),
        ("train.train_iters=~", "must be an integer, got '~'"),
        ("train.train_iters=" + "9" * 5000, "Exceeds the limit"),
        ("growth.exclude_layers=" + "[" * 600, "nested more than"),
        ("--train.train_iters=3", "settings are given without dashes: train.train_iters=..."),
        ("train.train_iters", "must be section.key=value in one word, e.g. train.train_iters=100"),
        ("3", "must be section.key=value"),
    ],
)
def test_a_refused_override_is_one_line(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--train.iters=3", "unknown key 'train.iters'; did you mean 'train_iters'?"),
        ("--train.train-iters=3", "write train.train_iters=... for --train.train-iters"),
        ("--train-iters=3", "did you mean 'train.train_iters'?"),
    ],
)
def test_flags_of_argparse(flag: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["--config", "a.yaml", flag])
    assert message in str(caught.value)


def test_what_a_later_override_takes_back_is_said(file: Path, tmp_path: Path) -> None:
    overrides = [
        "train.seed=1",
        "model.num_layers=4",
        "optim.lr=1",
        "train.seed=2",
        "model={num_layers: 3}",
        "modelx=1",
    ]
    assert repeated(overrides) == [
        "train.seed=1 has no effect: train.seed=2 follows",
        "model.num_layers=4 has no effect: model={num_layers: 3} follows",
    ]
    assert repeated(["model={num_layers: 3}", "model.num_layers=4"]) == []
    done = run_script(
        "pretrain_sgt.py", ["--config", str(file), "--print-config", *overrides[:1], *overrides[3:4]], tmp_path
    )
    assert done.code == 0 and done.err == "warning: train.seed=1 has no effect: train.seed=2 follows\n"
    assert "seed: 2" in done.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {seed: 1}\ntrain: {}\n", "'train' stands twice"),
        ("train: {seed: 1, seed: 2}\n", "'seed' stands twice"),
        ("train:\n\tseed: 1\n", "line 2: not valid YAML: found character"),
        ("", "holds nothing"),
        ("- a\n", "holds a list"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("train: !!python/object/apply:os.system [x]\n", "could not determine a constructor"),
        ("train: {seed: !!int x}\n", "invalid literal"),
        ("train: {seed: !!bool x}\n", "not valid YAML"),
        ("train: {seed: !!timestamp x}\n", "not valid YAML"),
        ("? [a]\n: 1\n", "is not text"),
        ("deepspeed: &a {b: *a}\n", "nested more than"),
        ("a: &a [1]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 20)}]\n" for m, n in ("ab", "bc", "cd", "de")),
         "more than 100,000 values"),
        ("train: " + "[" * 600, "nested more than"),
        ("train: {seed: " + "9" * 5000 + "}\n", "Exceeds the limit"),
        ("train: \x00\n", "special characters"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n"), lambda t: "---\n" + t])
def test_what_editors_add(file: Path, change: Any) -> None:
    expected = load_config(file)
    file.write_bytes(change(YAML).encode())
    assert load_config(file) == expected


def test_anchors_and_merges(file: Path) -> None:
    file.write_text(YAML.replace("train: {", "x: &x {seed: 5}\ntrain: {<<: *x, ").replace("x: &x", "deepspeed: &x", 1))
    with pytest.raises(ConfigError, match="built from the section"):
        load_config(file, ["deepspeed.optimizer=x"])
    assert load_config(file).train.seed == 5


BLENDS = [
    "0.3 a 0.7 b",
    "0.3 a, 0.7 b",
    "0.3,a,0.7,b",
    "30% a 70% b",
    " 0.3  a\t0.7 b ",
    ["0.3 a 0.7 b"],
    ["0.3 a", "0.7 b"],
    ["0.3", "a", "0.7", "b"],
    ["30%", "a", "70%", "b"],
    [0.3, "a", 0.7, "b"],
    [[0.3, "a"], [0.7, "b"]],
]


@pytest.mark.parametrize("given", BLENDS, ids=str)
def test_a_blend_in_every_form(file: Path, given: Any) -> None:
    file.write_text(f"{YAML}data: {{data_path: {json.dumps(given)}}}\n")
    assert load_config(file).data.blend() == ((0.3, "a"), (0.7, "b"))
    if isinstance(given, str):
        file.write_text(YAML)
        assert load_config(file, [f"data.data_path={given}"]).data.blend() == ((0.3, "a"), (0.7, "b"))


@pytest.mark.parametrize("prefix", ["my data/a", "a,b", "3 a", "a b c"])
def test_one_prefix_stays_one(file: Path, prefix: str) -> None:
    expected = "a" if prefix == "3 a" else prefix
    assert load_config(file, [f"data.data_path={prefix}"]).data.blend() == ((1.0, expected),)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[a, b]", "alike: [1, a, 1, b]"),
        ("[0.3, a, b]", "with weights above 0"),
        ("[0.3, a, nan, b]", "with weights above 0"),
        ("[-1, a, 1, b]", "with weights above 0"),
        ("[1e308, a, 1e308, b]", "too far apart"),
        ("[1e-300, a, 1e300, b]", "too far apart"),
        ("{a: 0.3, b: 0.7}", "is a mapping; write a blend as [weight, prefix"),
    ],
)
def test_what_is_no_blend(file: Path, given: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [f"data.data_path={given}"])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_data_path_may_have_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "a_text_document", [20] * 5)
    (tmp_path / "b.jsonl").write_text("{}")
    for path in ("a", "a_text_document", "a_text_document.bin", "a_text_document.idx"):
        assert resolve_prefix(path)[0] == "a_text_document"
    for path, message in (("a a", r"a blend: data\.data_path='\[weight"), ("b.jsonl", "preprocess_data.py makes one")):
        with pytest.raises(DataError, match=message):
            resolve_prefix(path)
