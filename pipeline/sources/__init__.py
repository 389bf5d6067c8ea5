"""Sources of weights: resolve a revision, pull its files, check them, and lock them."""
