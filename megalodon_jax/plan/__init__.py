"""Planning: what a training step costs on hardware you do not have (ahead-of-time compilation)."""
