"""Some of Keras' own tests through raykeras; `make keras-suite` runs all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat.keras_suite import run

MODULES = ("callbacks.early_stopping_test", "layers.core.embedding_test")


@pytest.mark.exhaustive
def test_sample_of_keras_tests_passes(tmp_path: Path) -> None:
    tests = ["--pyargs", *(f"keras.src.{module}" for module in MODULES)]
    outcomes = run(tests, tmp_path, ["--through-raykeras"])
    failed = {name: text for name, (state, text) in outcomes.items() if state in ("failure", "error")}
    assert list(failed) == ["EmbeddingTest::test_ragged"]
    assert "raykeras.core.errors.OptionError" in failed["EmbeddingTest::test_ragged"]  # so the call was redirected
    assert sum(state == "passed" for state, _ in outcomes.values()) >= 8
