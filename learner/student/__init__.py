"""The student's weights: sharded, adapted, optimised, published, saved."""
