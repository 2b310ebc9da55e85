"""Entries of a list that divides a run: each ends after so many steps, or tokens."""

from collections.abc import Iterator

from pydantic import Field

from megatron_sgt.config.base import MOST_TOKENS, Section


class Until(Section):
    """An entry that begins where the one before it ends."""

    until_steps: int | None = Field(
        default=None, gt=0, description="Applied optimizer steps of the run after which this entry ends."
    )
    until_tokens: int | None = Field(
        default=None,
        gt=0,
        le=MOST_TOKENS,
        description="The same in trained tokens, rounded up to a whole step; one of both.",
    )

    def problems(self) -> Iterator[str]:
        if (self.until_steps is None) == (self.until_tokens is None):
            yield "until_steps: give it or until_tokens, and not both"

    def last_step(self, tokens_per_step: int) -> int:
        """The last applied step of the entry."""
        if self.until_steps is not None:
            return self.until_steps
        assert self.until_tokens is not None, "problems() refuses an entry without either"
        return -(-self.until_tokens // tokens_per_step)
