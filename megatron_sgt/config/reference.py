"""The reference of all settings, generated from the configuration classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_sgt.config.base import MOST_SEED, Choice, is_path, section_class, shown
from megatron_sgt.config.presets import BASELINES
from megatron_sgt.config.root import Config

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}

_HEAD = """\
# Configuration

Made by `python tools/config_reference.py`; a test holds it against the classes in `megatron_sgt/config/`.

A configuration is one YAML file of the sections below. `base: other.yaml` takes another file's values first. On the
command line, `section.key=value` goes over the file, and `--preset NAME` between the two. Unknown keys are refused
with a suggestion; `python pretrain_sgt.py --config FILE --print-config` shows every value that a run gets.

**Paths.** `~`, `~user`, `$NAME` and `${NAME}` are filled in where the command runs, in every path of the configuration
and of all command lines. A variable that is not set, or empty, is refused, and so are line breaks. What a run records
holds the path itself. `tools/submit_slurm.py` refuses what belongs to the job (`$SLURM_...`, `$TMPDIR`), except in
`--mount` and `--env`, which the job's shell fills in; ranks that mean different run folders are refused.

**Values.** Files are YAML with the numbers and booleans of YAML 1.2: `1e-4` is a number, `010` is 10, `yes`, `on` and
`12:30` are text; the same key twice is refused. In an override the text behind `=` is taken as it stands, `exp #1`,
`a: b` and `- a` too; only quotes, `[...]` and `{...}` are read as YAML, and nothing at all is null. `~` alone is the
home folder in an override and null in a file. An override that a later one takes back is said.

**Numbers.** Integers without another bound end at 2147483647, other numbers at 1e+30; infinities and NaN are refused.
"""


def reference(growing: Mapping[str, str]) -> str:
    """The whole reference as Markdown. ``growing``: the presets of models that grow, and what they do."""
    return "\n".join([_HEAD, *_sections(Config), *_presets(growing)]) + "\n"


def _sections(config: type[BaseModel]) -> Iterator[str]:
    for name, field in config.model_fields.items():
        section = section_class(field.annotation)
        yield f"## {name}\n"
        if section is None:
            yield f"{field.description}\n"
            continue
        yield f"{' '.join((section.__doc__ or '').split())}\n"
        yield from _table(f"{name}.", section)
        yield ""


def _table(prefix: str, section: type[BaseModel]) -> Iterator[str]:
    yield "| key | values | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key, field in _leaves(prefix, section):
        cells = (f"`{key}`", _type(field), _default(field), " ".join((field.description or "").split()))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _leaves(prefix: str, section: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        inner = section_class(field.annotation)
        if inner is not None:
            yield from _leaves(f"{prefix}{name}.", inner)


def _type(field: FieldInfo) -> str:
    text = _type_name(field.annotation)
    if is_path(field.annotation, field.metadata):
        text = text.replace("text", "path")
    for bound in field.metadata:
        if isinstance(bound, Choice):
            text = ", ".join(f"`{name}`" for name in bound.built_in) + ", or a registered name"
        for name, sign in _BOUNDS.items():
            if hasattr(bound, name):
                text += f" {sign} {_bound(getattr(bound, name))}"
    return text


def _bound(number: float) -> str:
    return "2^63 - 1" if number == MOST_SEED else f"{number:g}" if isinstance(number, float) else str(number)


def _type_name(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(inside[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, UnionType):
        return " or ".join("null" if part is type(None) else _type_name(part) for part in inside)
    if origin is tuple:
        return f"list of {_type_name(inside[0])}s"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    names: Mapping[Any, str] = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}
    return names.get(annotation, "mapping")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    assert value is not PydanticUndefined
    return f"`{shown(value)}`"


def _presets(growing: Mapping[str, str]) -> Iterator[str]:
    yield "## Presets\n"
    yield (
        "`--preset NAME` trains the file's run as a baseline or an ablation: it changes the growth section alone, and "
        "appends its name to `logging.run_dir`. The layers of a block loop are those in the middle (here: of 24).\n"
    )
    yield "| preset | growth settings |"
    yield "| --- | --- |"
    for name, values_for in BASELINES.items():
        values = values_for(24)
        settings = ", ".join(f"`{key}: {shown(value)}`" for key, value in values.items() if value not in ([], None))
        yield f"| `{name}` | {settings} |"
    yield (
        "\nThese train it as a model that becomes deeper or wider ([growing.md](growing.md)). The file's `model`, with "
        "what the command line says of it, is the final one: the first stage's follows from it, and `growth.stages` "
        "from layers and steps. `--print-config` shows both.\n"
    )
    yield "| preset | the first stage, and how it grows |"
    yield "| --- | --- |"
    for name, summary in growing.items():
        yield f"| `{name}` | {summary} |"
