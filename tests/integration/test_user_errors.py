"""Every mistake of a user ends in one clear message, the documented exit code, and nothing written.

Each row is a command line in a copy of a small folder that works (see `folder`). What stderr must hold is the
user's own value and the fix. Tools: test_tool_errors.py.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import ROOT, Finished, limit_file_size, run_process, run_script, snapshot
from tests.helpers.datasets import write_dataset

CONFIG = """\
model: {num_layers: 4, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 48, seq_length: 16,
        vocab_size: 64, make_vocab_size_divisible_by: 16}
growth: {first_selection_step: 2, window_size: 2, num_keep_heads: 2}
parallel: {device: cpu}
optim: {lr: 1e-3}
train: {train_iters: 4, micro_batch_size: 2, global_batch_size: 4, eval_interval: 4, eval_iters: 1}
data: {data_path: data/walk, split: "90,10,0"}
checkpoint: {save_interval: 2}
logging: {run_dir: new, progress_bar: "off"}
"""
SAVED = ("logging.run_dir=saved",)
LOAD = ("checkpoint.load=saved/checkpoints",)


@dataclass(frozen=True)
class Mistake:
    """What the user types after `pretrain_sgt.py --config run.yaml`, and what must come of it.

    `spoil` damages the folder first. `dry`: --dry-run must find it too, with the same words. `late`: found in
    training, so that the new run_dir exists already. `environ`: variables that the process is given.
    """

    name: str
    arguments: tuple[str, ...]
    code: int
    words: tuple[str, ...]
    spoil: Callable[[Path], object] | None = None
    dry: bool = True
    late: bool = False
    environ: tuple[tuple[str, str], ...] = ()


def edit(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Spoil by replacing a file's bytes."""
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def write(file: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(text)


def remove(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).unlink()


def config(name: str, *arguments: str, says: tuple[str, ...]) -> Mistake:
    return Mistake(name, arguments, 2, says)


CONFIG_MISTAKES = (
    config("unknown key", "model.num_layer=8", says=("model.num_layer", "did you mean 'num_layers'?")),
    config("another project's key", "model.num_hidden_layers=8", says=("did you mean 'model.num_layers'?",)),
    config("wrong type", "model.num_layers=four", says=("model.num_layers: must be an integer, got 'four'",)),
    config("fraction", "train.train_iters=2.5", says=("train.train_iters: must be an integer, got 2.5",)),
    config("out of range", "optim.lr=-1", says=("optim.lr: must be > 0, got -1",)),
    config("misspelt choice", "optim.lr_decay_style=cosin", says=("got 'cosin'; did you mean 'cosine'?",)),
    config("heads by TP", "parallel.tensor_model_parallel_size=3",
           says=("model.num_attention_heads: 4 is not a multiple of tensor_model_parallel_size 3",)),
    config("groups by TP", "model.num_query_groups=1", "parallel.tensor_model_parallel_size=2",
           says=("model.num_query_groups: 1 is not a multiple of tensor_model_parallel_size 2",)),
    config("MLP by TP", "model.ffn_hidden_size=49", "parallel.tensor_model_parallel_size=2",
           says=("model.ffn_hidden_size: 49 is not a multiple of tensor_model_parallel_size 2",)),
    config("vocabulary by TP", "model.make_vocab_size_divisible_by=17", "parallel.tensor_model_parallel_size=2",
           says=("model.make_vocab_size_divisible_by: 17 is not a multiple",)),
    config("heads by groups", "model.num_query_groups=3", says=("num_attention_heads 4 is not a multiple",)),
    config("hidden by heads", "model.num_attention_heads=5",
           says=("hidden_size 32 is not a multiple of num_attention_heads 5", "set kv_channels")),
    config("global by micro batch", "train.global_batch_size=5", says=("5 is not a multiple", "micro_batch_size 2")),
    config("pipeline with ZeRO-3", "parallel.pipeline_model_parallel_size=2", "parallel.zero_stage=3",
           says=("parallel.zero_stage: 3 with pipeline_model_parallel_size 2", "use zero_stage 2 or 1")),
    config("sequence parallel alone", "parallel.sequence_parallel=true",
           says=("parallel.sequence_parallel: needs tensor_model_parallel_size above 1, got 1",)),
    config("bf16 without ZeRO", "parallel.zero_stage=0", "train.precision=bf16", says=("use parallel.zero_stage 1",)),
    config("fp16 without ZeRO", "parallel.zero_stage=0", "train.precision=fp16", "parallel.device=auto",
           says=("fp16 with zero_stage 0",)),
    config("fp16 on a CPU", "train.precision=fp16", says=("fp16 needs a GPU", "use fp32 or bf16")),
    config("DeepSpeed contradiction", "deepspeed.zero_optimization.stage=2",
           says=("deepspeed.zero_optimization.stage: 2 contradicts parallel.zero_stage 1", "leave it out")),
    config("DeepSpeed optimizer", "deepspeed.optimizer={type: Adam}", says=("deepspeed.optimizer", "section 'optim'")),
    config("DeepSpeed key misspelt", "deepspeed.zero_optimisation={}", says=("did you mean 'zero_optimization'?",)),
    config("DeepSpeed refuses", "deepspeed.zero_optimization.bucket=7", says=("bucket", "got 7", "leave it out")),
    config("override without value", "train.train_iters", says=("'train.train_iters'", "e.g. train.train_iters=100")),
    config("override of a number", "model.num_layers.x=1", says=("model.num_layers is 4, not a section",)),
    config("override not YAML", "data.data_path=[a", says=("'data.data_path=[a'", "not valid YAML")),
    config("split", "data.split=a,b", says=("data.split: 'a,b'", "such as '949,50,1'")),
    config("blend", "data.data_path=[a, b, c]", says=("['a', 'b', 'c']", "[weight, prefix, weight, prefix, ...]")),
    config("warm-up", "optim.lr_warmup_iters=9", says=("optim.lr_warmup_iters: 9 is above train.train_iters 4",)),
    config("layer that is not", "growth.exclude_layers=[0, 9]", says=("[9] outside the model's layers 0..3",)),
    config("too many heads kept", "growth.num_keep_heads=9", says=("9 is above model.num_attention_heads 4",)),
    config("no vocabulary", "model.vocab_size=null", says=("model.vocab_size: is required",)),
    config("run_dir below a file", "logging.run_dir=run.yaml/x",
           says=("logging.run_dir: cannot write to run.yaml/x", "is a file; choose another folder")),
    config("checkpoint.save below a file", "checkpoint.save=run.yaml/x", says=("checkpoint.save: cannot write to",)),
    config("Megatron's flags", "--num-layers", "8", says=("--num-layers", "'model.num_layers'", "section.key=value")),
    Mistake("TP alone", ("parallel.tensor_model_parallel_size=2",), 2,
            ("2 does not divide the 1 process", "torchrun --nproc-per-node 2"), dry=False),
    Mistake("cuda on a CPU", ("parallel.device=cuda",), 2, ("torch sees no GPU", "parallel.device=cpu"), dry=False),
    Mistake("batch arithmetic", ("train.global_batch_size=1000", "--dry-run", "--world-size", "16"), 2,
            ("global_batch_size 1000", "992 (accumulation 31), 1024 (accumulation 32)"), dry=False),
    Mistake("no ranks", ("--dry-run", "--world-size", "0"), 2, ("--world-size: must be above 0, got 0",), dry=False),
    Mistake("bad YAML", (), 2, ("run.yaml, line 2", "not valid YAML"), write("run.yaml", "a: 1\nb: }\n")),
    Mistake("no mapping", (), 2, ("run.yaml", "must be a mapping"), write("run.yaml", "- model\n")),
    Mistake("key twice", (), 2, ("'optim' stands twice",), write("run.yaml", "optim: {}\noptim: {}\n")),
    Mistake("base missing", (), 2, ("no such file: other.yaml",), write("run.yaml", "base: other.yaml\n")),
)  # fmt: skip


def bad_ids(folder: Path) -> None:
    write_dataset(folder / "data" / "wide", [100] * 50, vocab_size=200)


SENTENCEPIECE = "data.tokenizer={type: sentencepiece, model: %s}"
DATA_MISTAKES = (
    Mistake("data missing", ("data.data_path=data/nope",), 3, ("data/nope", "data sets in data: data/walk")),
    Mistake("no data named", ("data.data_path=[]",), 3, ("data.data_path is empty", "tools/preprocess_data.py")),
    Mistake("one of a blend", ("data.data_path=[1, data/walk, 1, data/nope]",), 3, ("data/nope",)),
    Mistake(".bin missing", (), 3, ("data/walk.bin does not", "copy both files"), remove("data/walk.bin")),
    Mistake(".idx missing", (), 3, ("data/walk.idx does not", "copy both files"), remove("data/walk.idx")),
    Mistake(".bin cut", (), 3, ("data/walk.bin is truncated", "copy it again"),
            edit("data/walk.bin", lambda old: old[:-100])),
    Mistake(".bin of another", (), 3, ("do not belong together",), edit("data/walk.bin", lambda old: old + b"more")),
    Mistake(".idx cut", (), 3, ("data/walk.idx is truncated",), edit("data/walk.idx", lambda old: old[:-100])),
    Mistake(".idx garbage", (), 3, ("data/walk.idx is not a Megatron index", "run tools/preprocess_data.py"),
            edit("data/walk.idx", lambda _: b"garbage" * 99)),
    Mistake(".idx of the future", (), 3, ("version 7", "known: version 1"),
            edit("data/walk.idx", lambda old: old[:9] + struct.pack("<Q", 7) + old[17:])),
    Mistake("tokenizer missing", (SENTENCEPIECE % "no.model",), 3, ("no.model does not exist", "train_tokenizer.py")),
    Mistake("tokenizer garbage", (SENTENCEPIECE % "run.yaml",), 3,
            ("run.yaml is not a sentencepiece model", "set data.tokenizer.type")),
    Mistake("tokenizer.json garbage", ("data.tokenizer={type: huggingface, model: run.yaml}",), 3,
            ("run.yaml is not a tokenizer.json", "set data.tokenizer.type")),
    Mistake("ids above the vocabulary", ("data.data_path=data/wide",), 3,
            ("token id 199", "vocabulary has 64 ids", "set data.tokenizer (or model.vocab_size)"), bad_ids),
    Mistake("validation too small", ("data.split=999,1",), 3,
            ("the valid split (data.split 999,1)", "set train.eval_interval to 0")),
    Mistake("samples too long", ("model.seq_length=20000",), 3, ("20000 + 1", "smaller model.seq_length")),
    Mistake("cache below a file", ("data.data_cache_path=run.yaml/x",), 3,
            ("run.yaml/x", "set data.data_cache_path"), dry=False),
)  # fmt: skip


def flip_bytes(folder: Path) -> None:
    """Damage that sizes do not show."""
    shard = next((folder / "saved/checkpoints/global_step4").glob("*model_states.pt"))
    data = bytearray(shard.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    shard.write_bytes(data)


def cut_shard(folder: Path) -> None:
    shard = next((folder / "saved/checkpoints/global_step4").glob("*model_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1])


def cut_all(folder: Path) -> None:
    for shard in (folder / "saved/checkpoints").glob("*/*model_states.pt"):
        shard.write_bytes(shard.read_bytes()[:-1])


def drop_shard(folder: Path) -> None:
    next((folder / "saved/checkpoints/global_step4").glob("*model_states.pt")).unlink()


STATE = "saved/checkpoints/global_step4/sgt_state.json"
CHECKPOINT_MISTAKES = (
    Mistake("nothing there", ("checkpoint.load=nope",), 4, ("no checkpoint at nope", "leave checkpoint.load empty")),
    Mistake("empty folder", ("checkpoint.load=hollow",), 4, ("at hollow (seen there: nothing)", "global_stepN"),
            lambda folder: (folder / "hollow").mkdir()),
    Mistake("a file", ("checkpoint.load=run.yaml",), 4, ("run.yaml (seen there: a file)", "global_stepN")),
    Mistake("latest points nowhere", LOAD, 4, ("'global_step9'", "there are: global_step2, global_step4"),
            write("saved/checkpoints/latest", "global_step9")),
    Mistake("shard cut", LOAD, 4, ("is damaged", "bytes instead of", "Copy it again"), cut_shard),
    Mistake("shard missing", LOAD, 4, ("is damaged", "is missing", "Copy it again"), drop_shard),
    Mistake("shard garbage", LOAD, 4, ("is damaged", "states.pt has changed since it was saved"), flip_bytes,
            dry=False),
    Mistake("manifest garbage", LOAD, 4, ("manifest.json is damaged",),
            edit("saved/checkpoints/global_step4/manifest.json", lambda old: old.replace(b"4", b"5", 1))),
    Mistake("all damaged", SAVED, 4, ("global_step4 is damaged", "global_step2 is damaged", "To start from scratch"),
            cut_all),
    Mistake("state garbage", LOAD, 4, ("sgt_state.json has changed since",), edit(STATE, lambda old: b"x" * len(old))),
    Mistake("another model", (*LOAD, "model.hidden_size=64"), 4, ("model.hidden_size is 32 there and 64 here",)),
    Mistake("two models in one run_dir", (*SAVED, "model.num_layers=5"), 4, ("model.num_layers is 4 there and 5",)),
    Mistake("other growth", (*LOAD, "growth.window_size=9"), 4, ("growth.window_size (checkpoint 2, run 9)",)),
    Mistake("no growth", (*SAVED, "growth.method=vanilla"), 4, ("'sgt'", "'vanilla'", "start a new run")),
    Mistake("over another run", (*SAVED, "checkpoint.resume=never"), 4,
            ("saved/checkpoints holds", "global_step2, global_step4", "Choose another logging.run_dir")),
    Mistake("no room for one", ("model.num_layers=5000", "model.hidden_size=16384", "--dry-run"), 4,
            ("a checkpoint takes about", "set checkpoint.save"), dry=False),
)  # fmt: skip


def environment(name: str, *words: str, **variables: str) -> Mistake:
    return Mistake(name, (), 2, words, environ=tuple(variables.items()))


RANKS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
MET = {**RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "20001"}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
}
ENVIRONMENT_MISTAKES = (
    environment("half of torchrun", "RANK is set (0) but WORLD_SIZE is not", "unset RANK", RANK="0"),
    environment("rank that is no number", "variable RANK must be an integer, got 'zero'", **{**MET, "RANK": "zero"}),
    environment("rank too high", "rank 5 of 2 processes", "ranks count from 0", **{**MET, "RANK": "5"}),
    environment("no local rank", "LOCAL_RANK is not set", "one of several", **{**MET, "LOCAL_RANK": ""}),
    environment("more on the node than in all", "local rank 0 of 4", **{**MET, "LOCAL_WORLD_SIZE": "4"}),
    environment("no meeting point", "MASTER_ADDR and MASTER_PORT is not set: where is rank 0 to be met?", **RANKS),
    environment("no port", "MASTER_PORT is not set", **{**MET, "MASTER_PORT": ""}),
    environment("port too high", "must be a port from 1 to 65535, got 99999", **{**MET, "MASTER_PORT": "99999"}),
    environment("leftovers of a launch", "WORLD_SIZE is 1, but 2 processes", "Unset", **STEP, RANK="0", WORLD_SIZE="1"),
    environment("Slurm without nodes", "neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set", **STEP),
    environment("Slurm's nodes", "cannot read the node list 'gpu[1'", **STEP, SLURM_STEP_NODELIST="gpu[1"),
    environment("Slurm's tasks", "cannot read the tasks per node 'two'", **STEP, SLURM_STEP_NODELIST="gpu1",
                SLURM_STEP_TASKS_PER_NODE="two"),
    environment("Slurm and the loopback", "MASTER_ADDR is localhost, but the step runs on 2 nodes", **STEP,
                SLURM_STEP_NODELIST="gpu[1-2]", MASTER_ADDR="localhost"),
    Mistake("a loss that is never finite", ("optim.lr=1e20", "optim.min_lr=0"), 1,
            ("3 steps in a row after step", "with a lower optim.lr"), dry=False, late=True),
    config("rollback without checkpoints", "train.spike_sigma=6", "checkpoint.save_interval=0",
           says=("train.spike_sigma: 6 needs checkpoints to go back to", "set checkpoint.save_interval")),
)  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, data and the checkpoints of a finished run."""
    path = tmp_path_factory.mktemp("user") / "template"
    (path / "data").mkdir(parents=True)
    (path / "run.yaml").write_text(CONFIG)
    write_dataset(path / "data" / "walk", [50] * 100, vocab_size=64)
    done = pretrain(path, *SAVED)
    assert done.code == 0, done.err
    return path


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A copy of the template to spoil."""
    return Path(shutil.copytree(template, tmp_path / "user"))


def pretrain(folder: Path, *arguments: str, before: Callable[[], None] | None = None) -> Finished:
    return run_script("pretrain_sgt.py", ["--config", "run.yaml", *arguments], folder, before)


def set_variables(variables: tuple[tuple[str, str], ...]) -> None:
    os.environ.update(variables)


def assert_told(done: Finished, code: int, words: tuple[str, ...]) -> None:
    """One message with these words, the exit code, no traceback."""
    assert done.code == code, done.err
    assert done.err.startswith("error: ") and done.err.count("error: ") == 1, done.err
    assert "Traceback" not in done.err
    missing = [word for word in words if word not in done.err]
    assert not missing, f"{missing} not in: {done.err}"


FAULTS = (*CONFIG_MISTAKES, *DATA_MISTAKES, *CHECKPOINT_MISTAKES, *ENVIRONMENT_MISTAKES)


@pytest.mark.parametrize("mistake", FAULTS, ids=lambda mistake: mistake.name)
def test_mistake(mistake: Mistake, folder: Path) -> None:
    if "parallel.device=cuda" in mistake.arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    if mistake.spoil is not None:
        mistake.spoil(folder)
    before = snapshot(folder)
    before_it = partial(set_variables, mistake.environ)
    done = pretrain(folder, *mistake.arguments, before=before_it)
    assert_told(done, mistake.code, mistake.words)
    if mistake.dry:
        dry = pretrain(folder, *mistake.arguments, "--dry-run", before=before_it)
        assert (dry.code, dry.err) == (done.code, done.err)
    if mistake.late:
        shutil.rmtree(folder / "new")
    assert snapshot(folder) == before


def test_a_full_disk_keeps_the_old_checkpoints(folder: Path) -> None:
    before = snapshot(folder / "saved" / "checkpoints")
    done = pretrain(folder, *SAVED, "train.train_iters=8", before=limit_file_size)
    assert "NOT SAVED  step 6" in done.out and "training goes on, the next try is at step 8" in done.out
    assert_told(done, 4, ("cannot write checkpoint saved/checkpoints/global_step8", "Make room"))
    assert snapshot(folder / "saved" / "checkpoints") == before
    again = pretrain(folder, *SAVED, "train.train_iters=8")
    assert again.code == 0 and "resumed at step 4" in again.out, again.err


def test_a_damaged_newest_checkpoint_is_passed_over(folder: Path) -> None:
    cut_shard(folder)
    (folder / "saved/checkpoints/global_step6.tmp").mkdir()
    done = pretrain(folder, *SAVED, "train.train_iters=6")
    assert done.code == 0 and "resumed at step 2" in done.out, done.err
    assert "SKIP  checkpoint saved/checkpoints/global_step4 is damaged" in done.out
    assert not list((folder / "saved/checkpoints").glob("*.tmp")), "leftovers of dead saves are cleared"
    again = pretrain(folder, *SAVED, "train.train_iters=6")
    assert again.code == 0 and "SKIP" not in again.out, "the damaged one was written again on the way"


def test_what_is_no_mistake_but_worth_a_word(folder: Path) -> None:
    """A finished run started again does nothing and says so; changed settings are named."""
    before = snapshot(folder / "saved" / "checkpoints")
    done = pretrain(folder, *SAVED)
    assert done.code == 0 and "nothing to do: raise train.train_iters (now 4)" in done.out, done.out
    assert "NaN" not in done.out and done.err == ""
    assert "global_step4 is at step 4 of 4; raise train.train_iters" in pretrain(folder, *SAVED, "--dry-run").out
    assert snapshot(folder / "saved" / "checkpoints") == before
    longer = pretrain(folder, *SAVED, "train.train_iters=6", "optim.lr=2e-3")
    assert longer.code == 0 and "changed: optim.lr 0.001 -> 0.002; train.train_iters 4 -> 6" in longer.out


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


PRETRAIN = str(ROOT / "pretrain_sgt.py")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((PRETRAIN,), 2, ("required: --config", "usage: pretrain_sgt.py")),
        ((PRETRAIN, "--config", "rum.yaml"), 2, ("no such file: rum.yaml", "did you mean 'run.yaml'?")),
        (("-m", "megatron_sgt", "--config"), 2, ("--config: expected one argument", "usage: ")),
        ((PRETRAIN, "--config", "run.yaml", "data.data_path=nope"), 3, ("no indexed data set at nope",)),
        ((PRETRAIN, "--config", "run.yaml", "checkpoint.load=nope"), 4, ("no checkpoint at nope",)),
    ],
    ids=lambda value: " ".join(value[-1:]) if isinstance(value, tuple) else None,
)
def test_as_a_process(arguments: tuple[str, ...], code: int, words: tuple[str, ...], folder: Path) -> None:
    before = snapshot(folder)
    assert_told(run_process(python(*arguments), folder), code, words)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train.global_batch_size=6", "train.micro_batch_size=3", "parallel.zero_stage=7"), ("got 7",)),
        ((SENTENCEPIECE % "no.model",), ("no.model does not exist",)),
        (("data.data_path=data/nope", "parallel.tensor_model_parallel_size=2"), ("data sets in data",)),
    ],
    ids=["configuration", "before the ranks meet", "after they met"],
)
def test_two_ranks_tell_it_once(arguments: tuple[str, ...], words: tuple[str, ...], folder: Path) -> None:
    before = snapshot(folder)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_process(python(*launcher, PRETRAIN, "--config", "run.yaml", *arguments), folder)
    told = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 1 and len(told) == 1, done.err  # torchrun's own exit code
    assert all(word in told[0] for word in words), told
    assert "megatron_sgt/" not in done.err  # torchrun shows a traceback of its own
    assert snapshot(folder) == before
