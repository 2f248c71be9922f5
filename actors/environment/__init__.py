"""Environments that answer the student between its turns, and what they write as token ids."""
