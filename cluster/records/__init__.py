"""The files of a run directory: written, read back, sent to trackers."""
