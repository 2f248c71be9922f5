"""Ten minutes on one card: parts that each compare a path of the GPU with one that is known to be right, and time it."""
