"""The container engine, and who started a container."""
