"""Some of Keras' own tests through raykeras; `make keras-suite` runs all of them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.compat.keras_suite import REASONS, ROOT, run

MODULES = ("callbacks.early_stopping_test", "layers.core.embedding_test")


def test_some_of_keras_own_tests(tmp_path: Path) -> None:
    tests = ["--pyargs", *(f"keras.src.{module}" for module in MODULES)]
    outcomes = run(tests, tmp_path, ["--through-raykeras"])
    failed = {name: text for name, (state, text) in outcomes.items() if state in ("failure", "error")}
    assert list(failed) == ["EmbeddingTest::test_ragged"]
    assert "raykeras.errors.OptionError" in failed["EmbeddingTest::test_ragged"]  # so that it came here
    assert sum(state == "passed" for state, _ in outcomes.values()) >= 8


def test_documentation_has_every_reason() -> None:
    page = (ROOT / "docs/design/keras_suite.md").read_text()
    for tests in json.loads(REASONS.read_text()).values():
        for start, reason in tests.items():
            assert f"| {start}" in page
            assert reason in page
