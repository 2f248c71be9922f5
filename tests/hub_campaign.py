"""Light campaigns whose models are on a hub of tests/fake_hub.py. Each runs in a process of its own."""

from pathlib import Path

import pytest

from tests import fake_hub, light_campaign


def run_on_hub(config: Path, url: str, cache: Path, offline: bool = False) -> None:
    """`understudy run` with the real client, which asks the hub at `url`."""
    fake_hub.use(pytest.MonkeyPatch(), url, cache, offline=offline)
    light_campaign.run_command_here(config.parent, "run", str(config))
