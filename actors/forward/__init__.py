"""The forward pass that teacher and learner share: packing, attention within a pack, log-probs in chunks."""
