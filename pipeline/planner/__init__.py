"""What a model needs before anything is done: memory, GPUs, speed, disk, from its configuration and its headers."""
