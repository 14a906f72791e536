"""`flyray calibrate`: activation statistics of a model's routed experts, gathered by the engine while it runs text."""
