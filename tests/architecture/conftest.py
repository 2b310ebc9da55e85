"""What holds for the tests of the sources."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.architecture.source_tree import source_of


@pytest.fixture(autouse=True, scope="module")
def parsed_once() -> Iterator[None]:
    """Trees of the sources last as long as a file of rules: they are a few hundred megabytes."""
    yield
    source_of.cache_clear()
