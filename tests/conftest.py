"""What holds for all tests."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def environment_stays_as_it_was() -> Iterator[None]:
    """vLLM sets two dozen variables when it is imported; processes that later tests start must not inherit them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
