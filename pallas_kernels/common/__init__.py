"""What the operations share: the target device, kernel launchers, context parallelism."""
