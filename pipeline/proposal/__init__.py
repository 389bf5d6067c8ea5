"""A first model file for a source: its schemes, how it is served, its limits, and what the release will take."""
