"""The smallest configuration that loads. Its models and prompts do not exist."""

from pathlib import Path

from cluster.config import CampaignConfig
from cluster.config_file import load_config

BASE = """
name: here
student: {model: s}
teachers: {default: {model: t}}
prompts: {path: p}
"""


def config(folder: Path, *overrides: str) -> CampaignConfig:
    """The configuration with these overrides, by way of a file in the folder."""
    path = folder / "campaign.yaml"
    path.write_text(BASE)
    return load_config(path, overrides)
