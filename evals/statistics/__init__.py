"""Paired statistics, early looks, resampling and trends."""
