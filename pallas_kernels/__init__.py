"""The operations under MEGALODON, usable alone from any JAX code."""
