"""Copies of the metrics elsewhere: TensorBoard, Weights & Biases, MLflow, Prometheus."""
