"""Training: optimizer, step, checkpoints, measurements, the loop, and the command line."""
