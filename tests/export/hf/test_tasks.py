"""Classification and question answering on exported models, beside Llama's classes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from megatron_sgt.export import hf
from megatron_sgt.export.forms import STANDARD
from megatron_sgt.export.hf import modeling_sgt
from tests.helpers.hf_models import as_llama, gap, hf_config, random_ids

TASKS = ["SequenceClassification", "TokenClassification", "QuestionAnswering"]


def make(task: str, variant: str = "grouped_qk_norm_depth_3", **changes: Any) -> Any:
    torch.manual_seed(5)
    config = hf_config(variant, num_labels=3, initializer_range=0.2, **changes)
    return getattr(modeling_sgt, f"SGTFor{task}")(config).eval()


def targets(task: str, tokens: Tensor) -> dict[str, Tensor]:
    if task == "QuestionAnswering":
        return {"start_positions": torch.arange(len(tokens)), "end_positions": torch.arange(len(tokens)) + 2}
    return {"labels": tokens[:, 0] % 3 if task == "SequenceClassification" else tokens % 3}


def answers(output: Any) -> Tensor:
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("task", TASKS)
def test_without_loops_they_are_llamas(task: str, side: str) -> None:
    model = make(task, "never_grown", num_key_value_heads=2)
    llama = as_llama(model, f"LlamaFor{task}")
    tokens = random_ids(3, 9)
    mask = torch.ones_like(tokens)
    for row, length in enumerate((9, 4, 6)):
        gone = slice(length, None) if side == "right" else slice(0, 9 - length)
        tokens[row, gone], mask[row, gone] = 0, 0
    found, expected = (m(tokens, attention_mask=mask, **targets(task, tokens)) for m in (model, llama))
    assert gap(answers(found), answers(expected)) < 1e-5 and gap(found.loss, expected.loss) < 1e-5
    assert set(found) == set(expected)


def test_padding_does_not_change_the_class_of_a_looping_model() -> None:
    model, tokens = make("SequenceClassification"), random_ids(1, 6)
    alone = model(tokens).logits
    for padding in ((0, 4), (4, 0)):
        padded, mask = pad(tokens, padding), pad(torch.ones_like(tokens), padding)
        assert gap(model(padded, attention_mask=mask).logits, alone) < 1e-5


@pytest.mark.parametrize("task", TASKS)
def test_they_train(task: str) -> None:
    model, tokens = make(task).train(), random_ids(4, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(tokens, **targets(task, tokens)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def write_folder(folder: Path) -> modeling_sgt.SGTForCausalLM:
    """A language model with its code, as the export writes it."""
    model = modeling_sgt.SGTForCausalLM(hf_config("grouped_qk_norm_depth_3", auto_map=STANDARD.auto_map))
    model.save_pretrained(folder)
    for name in STANDARD.files:
        shutil.copyfile(Path(str(hf.__file__)).parent / name, folder / name)
    return model


def test_from_an_export_to_a_classifier_and_back(tmp_path: Path) -> None:
    """Tuned as one thing and saved, a folder can still be loaded as every other."""
    exported = write_folder(tmp_path / "exported")
    folder, tokens = tmp_path / "exported", random_ids(2, 5)
    for number, task in enumerate(("CausalLM", *TASKS, "CausalLM")):
        kind = getattr(transformers, f"AutoModelFor{task}")
        model = kind.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__name__ == f"SGTFor{task}" and type(model).__module__.startswith("transformers_modules")
        assert torch.equal(model.model(tokens)[0], exported.eval().model(tokens)[0])
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        again = kind.from_pretrained(folder, trust_remote_code=True).eval()
        assert torch.equal(answers(again(tokens)), answers(model(tokens)))
