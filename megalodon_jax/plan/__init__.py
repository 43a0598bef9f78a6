"""What a training step costs on a machine that is not there."""
