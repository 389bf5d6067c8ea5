"""The container engine, and the process that owns each container."""
