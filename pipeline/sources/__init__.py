"""Where weights come from: resolved, pulled, checked and locked."""
