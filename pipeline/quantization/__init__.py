"""Quantizing a model, and checking the result without the quantizer."""
