"""Settings of every test: how many random examples, one thread per process, and no traces in the environment."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported. Tests run two at a time on two cores, and their tensors are too small for a second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `nohup make test` ignores SIGHUP, a shell's `make test &` SIGINT. Commands that tests start would inherit that.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import HealthCheck, settings

# No deadlines: how long an example takes depends on what else the machine does.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=50, derandomize=True, **COMMON)
settings.register_profile("nightly", max_examples=300, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


LONGEST = (
    *("integration/test_chaos", "e2e/test_quickstart", "integration/test_fleet", "integration/test_run"),
    *("integration/test_job", "integration/test_matrix", "integration/test_evaluate", "integration/test_nodes"),
    *("integration/test_control_store", "unit/test_fuzz", "integration/test_steering", "integration/test_versions"),
    *("integration/test_teacher_backends", "integration/test_extending", "unit/cluster/test_interrupts"),
    *("unit/learner/test_sharding", "unit/learner/test_sequence_parallel", "unit/cluster/test_resume"),
)
"""Files of tests by their time, the longest first. The others take less than half a minute each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first, so that at the end neither of two workers waits for the other."""
    places = {name: place for place, name in enumerate(LONGEST)}
    folder = Path(__file__).parent
    items.sort(key=lambda item: places.get(str(item.path.relative_to(folder).with_suffix("")), len(places)))


@pytest.fixture(scope="module", autouse=True)
def environment_stays_as_it_was() -> Iterator[None]:
    """vLLM sets two dozen variables when it is imported; processes that later tests start must not inherit them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
