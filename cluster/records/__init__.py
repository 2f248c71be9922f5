"""The files of a run directory: the writer, the readers, and the tables of events and metrics."""
