"""Estimates of throughput and memory before a campaign starts."""
