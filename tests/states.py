"""The newest checkpoint of a run directory and the state in it, as they are: nothing is checked."""

import json
from pathlib import Path

from cluster.config import CampaignConfig
from cluster.state.campaign_state import CampaignState, read_state
from learner.student.checkpoint import latest_checkpoint


def load_state(config: CampaignConfig) -> tuple[CampaignState, Path | None]:
    """A new state and None if there is no checkpoint."""
    checkpoint = latest_checkpoint(config.run_dir / "checkpoints")
    return (CampaignState(), None) if checkpoint is None else (read_state(checkpoint), checkpoint)


def write_learners_files(directory: str | Path, version: int) -> None:
    """The least that a learner writes into a checkpoint."""
    training = Path(directory, "training")
    training.mkdir(exist_ok=True)
    (training / "learner.json").write_text(json.dumps({"policy_version": version, "beta": 0.0}))
