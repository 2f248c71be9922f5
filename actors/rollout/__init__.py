"""The rollout actor, and the engine that samples for it."""
