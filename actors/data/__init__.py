"""Prompts, verifiers, models and tokenizers: what the roles read from files."""
