"""Text from outside, as it may be shown: nothing in it moves the cursor, hides a line or passes for another one."""

from __future__ import annotations

import unicodedata

# Control characters, those that turn the direction of text, line separators, half of a pair, and what is nobody's.
_UNSHOWN = frozenset({"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"})


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return the text with each character that a terminal would act on written as ``\x1b`` or ``\u202e``.

    A line break is such a character, unless the text may have ``lines`` of its own; a tab becomes a space.
    """
    return "".join(_shown(character, lines=lines) for character in text)


def _shown(character: str, *, lines: bool) -> str:
    if character == "\n" and lines:
        return character
    if character == "\t":
        return " "
    if unicodedata.category(character) not in _UNSHOWN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()
