"""Marks that transformers' own tests carry (see tests/helpers/transformers_suite.py)."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    for mark in ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test",
                 "torch_export_test", "generate", "is_pipeline_test", "is_staging_test", "order"):  # fmt: skip
        config.addinivalue_line("markers", f"{mark}: of transformers' own tests")
