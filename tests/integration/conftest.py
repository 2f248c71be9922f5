"""One local Ray for the tests of this folder that ask for it, and a Python for campaigns on a Ray of their own."""

import logging
import os
from collections.abc import Iterator

import pytest

from tests.warm_python import warm_python


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The path of a Python whose processes have imported everything (tests/warm_python.py)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with warm_python(tmp_path_factory.mktemp("warm"), environment) as executable:
        yield executable


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A private Ray with four cores on paper and light actors."""
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()
