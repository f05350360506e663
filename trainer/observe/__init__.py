"""What a person sees of a run: log lines, metrics, TensorBoard, pictures, the report."""
