"""Code shared by the operations: target device, kernel launchers, context parallelism."""
