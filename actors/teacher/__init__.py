"""Teacher actors: one module for each backend, and what all backends share."""
