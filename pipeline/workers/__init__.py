"""Worker scripts: their pinned environments, and the launchers that run them."""
