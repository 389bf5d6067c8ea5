"""Content-addressed artifacts, and which of them each asset last made."""
