"""What the configuration knows of the tables of built-in parts that it names."""

from pydantic import BaseModel

from megatron_sgt.config.base import Choice


def built_in(section: type[BaseModel], field: str) -> tuple[str, ...]:
    """The names that ``field`` takes without any installed package."""
    [choice] = [found for found in section.model_fields[field].metadata if isinstance(found, Choice)]
    return choice.built_in
