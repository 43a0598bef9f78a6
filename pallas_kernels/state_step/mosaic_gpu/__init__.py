"""A step of CEMA on NVIDIA Hopper."""
