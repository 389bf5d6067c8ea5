"""Runs images in hardened containers, without a network, and measures their memory."""
