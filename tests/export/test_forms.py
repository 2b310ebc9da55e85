"""The forms of exported models: every file, class and name in the table exists and belongs to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sgt.export import hf
from megatron_sgt.export.forms import CAUSAL_LM, FORMS, Form, form_of
from megatron_sgt.export.hf.loading import own_class


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_forms_files_and_classes_exist(form: Form) -> None:
    folder = Path(str(hf.__file__)).parent
    assert all((folder / name).is_file() for name in form.files)
    assert {f"{target.split('.')[0]}.py" for target in form.auto_map.values()} <= set(form.files)
    classes = {auto: own_class(form, auto) for auto in form.auto_map}
    config = classes.pop("AutoConfig")
    assert config.model_type == form.model_type and form_of(config.model_type) is form
    assert all(kind.config_class is config for kind in classes.values())
    assert classes[CAUSAL_LM].__name__ == form.architecture == form.head()["architectures"][0]


def test_a_plain_model_is_of_no_form() -> None:
    assert form_of("llama") is None and form_of(None) is None
