"""Weight versions in transit: buckets with checksums, and lossless deltas between versions."""
