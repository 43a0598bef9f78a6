"""Device meshes, sharding rules, and runs of several processes."""
