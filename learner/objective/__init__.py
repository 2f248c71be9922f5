"""The mathematics of the objective: pure functions of tensors."""
