"""Training: the step, the loop, metrics, throughput and signals."""
