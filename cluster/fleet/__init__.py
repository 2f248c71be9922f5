"""Ray: actors, fleets of them, clusters and jobs."""
