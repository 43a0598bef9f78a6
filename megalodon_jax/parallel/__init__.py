"""Device meshes, sharding rules and multi-process runs."""
