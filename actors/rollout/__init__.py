"""The rollout actor, and the engines that sample for it."""
