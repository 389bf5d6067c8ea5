"""This machine's CPU and GPUs, and which process may use them."""
