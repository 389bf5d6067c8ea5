"""The release, in stage order."""
