"""The campaign loop: its stages, the queues between them, and what it reports."""
