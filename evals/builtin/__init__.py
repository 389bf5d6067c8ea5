"""Data that comes with Slipway, for models that have none of their own: see README.md here."""

from pathlib import Path

FILES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.jsonl"))}
"""What a model file calls ``builtin:NAME``, by name."""
