"""Verifiers, models, tokenizers and recorded trajectories: what the roles read from files."""
