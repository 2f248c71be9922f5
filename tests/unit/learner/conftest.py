"""Models that the learner's tests share."""

from pathlib import Path

import pytest

from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "student": make_tiny_model(folder / "student", hidden=32, layers=1),
        "other": make_tiny_model(folder / "other", hidden=32, layers=1, seed=7),
    }
