"""Import and export of weights: released checkpoints and safetensors files."""
