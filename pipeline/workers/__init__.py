"""Worker scripts: their pinned environments, and where they run."""
