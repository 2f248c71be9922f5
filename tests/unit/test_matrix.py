"""The campaigns of tests/matrix_campaigns.py make every choice of the configuration."""

import pytest

from cluster.config import CampaignConfig
from cluster.config_file import load_config
from tests.choices import choices, made_by
from tests.matrix_campaigns import BASE, CAMPAIGNS, EXCEPTIONS, overrides


@pytest.fixture(scope="module")
def configurations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CampaignConfig]:
    file = tmp_path_factory.mktemp("matrix") / "base.yaml"
    file.write_text(BASE)
    return {name: load_config(file, overrides(name)) for name in CAMPAIGNS}


def test_every_choice_has_a_campaign_or_a_reason(configurations: dict[str, CampaignConfig]) -> None:
    made = set().union(*map(made_by, configurations.values()))
    missing = sorted(choices() - made - EXCEPTIONS.keys())
    assert not missing, f"no campaign of tests/matrix_campaigns.py has {missing}"
    stale = sorted(EXCEPTIONS.keys() - (choices() - made))
    assert not stale, f"EXCEPTIONS has what a campaign makes, or what is no choice: {stale}"
