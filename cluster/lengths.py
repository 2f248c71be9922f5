"""How long the texts of a campaign are, from its prompts and its configuration: what engines and episodes need room for."""

import numpy as np

from actors.rollout.engine import PromptLengths
from actors.rollout.episodes import EpisodeLimits
from cluster.config import CampaignConfig
from cluster.inputs import Inputs


def prompt_lengths(config: CampaignConfig, inputs: Inputs) -> PromptLengths:
    """Of the prompts that the student reads."""
    trained = None if config.text_by != "student" else inputs.prompts  # others write those responses
    longest = int(np.diff(trained.offsets).max()) if trained is not None else 0
    own = {name: config.sampling_of(one).max_response_tokens for name, one in config.evaluation.sets.items()}
    held_out = [(one.prompts, own[name]) for name, one in inputs.sets.items()]
    if inputs.held_out is not None:
        held_out.append((inputs.held_out, config.evaluated.sampling.max_response_tokens))
    written = longest_written(config)
    whole = [max(int(np.diff(prompts.offsets).max()), written) + response for prompts, response in held_out]
    usual = int(inputs.prompts.offsets[-1]) // len(inputs.prompts)
    return PromptLengths(usual, max(longest, written), max(whole, default=0))


def longest_written(config: CampaignConfig) -> int:
    """Tokens of the longest prompt that an environment may write; 0: no longer ones than those of the records."""
    return (config.prompts.max_prompt_tokens or 0) if config.environment is not None else 0


def episode_limits(config: CampaignConfig, inputs: Inputs) -> EpisodeLimits:
    """What the text of an episode has to fit into."""
    lengths = prompt_lengths(config, inputs)
    return EpisodeLimits(
        max(lengths.longest + config.sampling.max_response_tokens, lengths.whole),
        own_prompts=all(teacher.prompt_template is None for teacher in config.teachers.values()),
        needs_reward=config.gives_rewards,
    )
