"""The one role that changes weights."""
