"""tools/generate.py as a user starts it."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_sgt.export.forms import SERVING
from tests.helpers import grown_run
from tests.helpers.commands import run_here, snapshot

SCRIPT = "tools/generate.py"


def test_a_checkpoint_and_its_export_print_the_same(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the quick\nover the\n")
    before = snapshot(tmp_path)
    options = ["--prompt", "dog", "--prompt-file", "prompts.txt", "--max-new-tokens", "6", "--dtype", "fp32"]
    outs = []
    for model in (grown_run.checkpoints(), grown_run.export()):
        for more in (["--greedy"], ["--temperature", "0.9", "--num-samples", "2", "--seed", "3"]):
            done = run_here(SCRIPT, [str(model), *options, *more], tmp_path)
            assert (done.code, done.err) == (0, "")
            outs.append(done.out)
    assert outs[:2] == outs[2:]
    done = run_here(SCRIPT, [str(grown_run.export(SERVING)), *options, "--greedy"], tmp_path)
    assert (done.code, done.out) == (0, outs[0])
    assert [outs[0].find(prompt) for prompt in ("dog", "the quick", "over the")] == sorted(
        outs[0].find(prompt) for prompt in ("dog", "the quick", "over the")
    )
    assert outs[1].count("the quick") >= 2
    assert snapshot(tmp_path) == before


def test_a_blank_line_is_an_empty_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\nthe\n")
    options = ["--prompt", "", "--prompt-file", "prompts.txt", "--max-new-tokens", "4", "--greedy", "--jsonl"]
    done = run_here(SCRIPT, [str(grown_run.checkpoints()), *options], tmp_path)
    one, other, third = map(json.loads, done.out.splitlines())
    assert (done.code, done.err, third["prompt"]) == (0, "", "the")
    assert one == other and one["prompt"] == "" and len(one["tokens"]) <= 4


def test_one_json_object_per_sample(tmp_path: Path) -> None:
    arguments = [
        str(grown_run.checkpoints()),
        "--prompt",
        "the",
        "--max-new-tokens",
        "4",
        "--greedy",
        "--jsonl",
    ]
    for more in ([], ["--dtype", "bf16"]):
        done = run_here(SCRIPT, [*arguments, *more], tmp_path)
        (sample,) = map(json.loads, done.out.splitlines())
        assert done.code == 0 and sample["prompt"] == "the" and len(sample["tokens"]) == 4
