"""YAML for configurations: numbers and booleans of YAML 1.2, no duplicate keys; and the values of overrides.

PyYAML follows YAML 1.1, where ``6e-4`` is text, ``on`` is true and ``010`` is 8, and silently uses the last of several
equal keys.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megatron_sgt.errors import ConfigError, first_line

MOST_DEPTH, MOST_VALUES = 50, 100_000
_TOO_LARGE = f"nested more than {MOST_DEPTH} deep, or more than {MOST_VALUES:,} values; no configuration is"
_BEGIN_YAML = ("'", '"', "[", "{")

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_RESOLVERS = (
    ("tag:yaml.org,2002:bool", _BOOL, "tTfF"),
    ("tag:yaml.org,2002:int", _INT, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+.0123456789"),
)
_REPLACED = {"bool", "int", "float", "timestamp"}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            is_merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "[...]"
            if not is_merge and key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node).replace("_", ""))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either YAML version would read as something else."""

    yaml_implicit_resolvers: ClassVar = {
        first: list(found) for first, found in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _tag, _regexp, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _regexp, list(_first))
    _Dumper.add_implicit_resolver(_tag, _regexp, list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def parse_value(text: str, source: str) -> Any:
    """Return the value of an override: quoted texts, lists and mappings in brackets as in YAML; nothing is null.

    Anything else is a number, a boolean, null, or text as it stands: no sign in it has a meaning, so that nothing
    behind `` #`` is lost and ``a: b`` or ``- a`` need no quotes. ``~`` is text too, since a path may be one.

    Raises:
        ConfigError: naming ``source``.
    """
    text = text.strip()
    if text.startswith(_BEGIN_YAML):
        value = parse_yaml(text, source)
        end = yaml.compose(text, Loader=_Loader).end_mark.index
        if rest := text[end:].strip():
            raise ConfigError(f"{source}: {rest!r} stands behind the value; put all of it into quotes")
        return value
    if "\n" in text or "\r" in text:
        raise ConfigError(f"{source}: a value of several lines; write lists and mappings in brackets")
    if text == "~":
        return text
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    if tag.rpartition(":")[2] not in ("bool", "int", "float", "null"):
        return text
    return _built(lambda: loader.construct_document(yaml.ScalarNode(tag, text)), source)


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ConfigError: naming ``source`` and the line.
    """
    # A subclass of SafeLoader: builds plain values only.
    value = _built(lambda: yaml.load(text, Loader=_Loader), source)
    _check_size(value, source)
    return value


def _built(build: Callable[[], Any], source: str) -> Any:
    try:
        return build()
    except RecursionError:
        raise ConfigError(f"{source}: {_TOO_LARGE}") from None
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        # What a tag asks for and its text is not (!!bool maybe), a number of ten thousand digits.
        raise ConfigError(f"{source}: not valid YAML: {first_line(error)}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = source if mark is None else f"{source}, line {mark.line + 1}"
        detail = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{place}: not valid YAML: {detail}") from error


def _check_size(value: Any, source: str) -> None:
    """Refuse what an anchor has made endless or huge, before anything walks over it."""
    waiting, count = [(value, 1)], 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if depth > MOST_DEPTH or count > MOST_VALUES:
            raise ConfigError(f"{source}: {_TOO_LARGE}")
        inside = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        waiting += [(one, depth + 1) for one in inside]


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigError: it holds none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise ConfigError(f"{path}: must be a mapping of sections (model:, optim:, train:, ...), holds {found}")
    return value


def dump_yaml(value: Any) -> str:
    """Return YAML text for plain values, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)
