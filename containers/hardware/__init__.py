"""This machine's CPU and GPUs, and the locks that assign them to processes."""
