"""Says which seed the random inputs come from, so that a failure can be had again."""

from __future__ import annotations

from fuzzing import EXAMPLES, SEED


def pytest_report_header() -> str:
    return f"fuzz: SUITE_FUZZ_SEED={SEED} SUITE_FUZZ_EXAMPLES={EXAMPLES}"
