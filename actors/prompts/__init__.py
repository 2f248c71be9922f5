"""Prompts: their records, which may be millions, as arrays, and requests of them."""
