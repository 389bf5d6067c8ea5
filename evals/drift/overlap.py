"""Calibration hygiene: which evaluation items share a run of words with the text that the quantizer looked at.

Runs of thirteen words, as lm-eval's own decontamination has them (after GPT-3's, arXiv 2005.14165, appendix C), hashed
to eight bytes: an item's words don't leave the worker, and the calibration text is compared long after. Standard
library alone, for it also runs in a worker.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

WORDS = 13
FEWEST = 8  # a shorter item is one run of all its words; below this it says nothing
_WORD = re.compile(r"\w+")


def runs(text: str) -> set[int]:
    """Return the hashes of every run of `WORDS` words in a text, lower case, whatever stands between the words."""
    words = _WORD.findall(text.lower())
    if len(words) < FEWEST:
        return set()
    length = min(WORDS, len(words))
    return {_hash(words[start : start + length]) for start in range(len(words) - length + 1)}


def pooled(texts: Iterable[str]) -> set[int]:
    """Return the runs of all texts, and of no text beyond its end; shorter runs too, for items that are shorter."""
    found: set[int] = set()
    for text in texts:
        words = _WORD.findall(text.lower())
        for length in range(FEWEST, WORDS + 1):
            found |= {_hash(words[start : start + length]) for start in range(len(words) - length + 1)}
    return found


def _hash(words: list[str]) -> int:
    return int.from_bytes(hashlib.blake2b("\x1f".join(words).encode(), digest_size=8).digest(), "little")
