"""Calibration samples as blocks of tokens, each of ``max_tokens`` at most, for the quantizers' workers.

Conversations go through the chat template and lie whole in a block, as many as fit. Of one that is longer than a block
the last messages are left out. Texts fill what conversations leave, and are split where a block ends. Where texts do
not suffice, blocks of conversations are shorter: nothing is padded, since quantizers would take padding for text.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipway_worker import Report, WorkerError

if TYPE_CHECKING:
    from pipeline.quantization.mixture import SensitivityRequest
    from pipeline.quantization.quantize import QuantizationRequest

# With fewer tokens, statistics of a layer's inputs are meaningless.
MINIMUM_TOKENS = 512
# Roles of instructions.
_INSTRUCTIONS = frozenset({"system", "developer"})
# The share of cut or empty samples from which on there is a warning.
_MOST = 0.5


@dataclass(frozen=True)
class CalibrationBlocks:
    """The blocks, and of the samples how many were longer than a block, and how many held no token."""

    blocks: list[list[int]]
    cut: int
    empty: int

    @property
    def tokens(self) -> int:
        """How many tokens the blocks have."""
        return sum(map(len, self.blocks))

    @property
    def used(self) -> dict[str, int]:
        """What a worker's result says of its calibration: `CalibrationUse` in `pipeline.quantization.quantize`."""
        return {"tokens": self.tokens, "cut": self.cut, "empty": self.empty}


def calibration_blocks(request: QuantizationRequest | SensitivityRequest, report: Report) -> CalibrationBlocks:
    """Turn the samples of a `QuantizationRequest` into blocks; warn where most are cut or empty.

    Raises:
        WorkerError: there are too few tokens, or the chat template can't render a conversation.
    """
    max_tokens = request["max_tokens"]
    encode = _encoder(Path(request["source"]))
    texts = [encode(each, True) for each in request["texts"] if isinstance(each, str)]
    chats = [each for each in request["texts"] if not isinstance(each, str)]
    render = _renderer(Path(request["source"]), request["chat_template"]) if chats else str
    rendered = [encode(render(each), False) for each in chats]
    whole = [
        tokens if len(tokens) <= max_tokens else _shortened(chat, max_tokens, lambda chat: encode(render(chat), False))
        for chat, tokens in zip(chats, rendered, strict=True)
    ]
    rest = iter([token for tokens in texts for token in tokens[:max_tokens]])
    blocks = _packed([tokens for tokens in whole if tokens], max_tokens)
    for block in blocks:
        block.extend(islice(rest, max_tokens - len(block)))
    blocks += _split(rest, max_tokens)
    samples = [*texts, *rendered]
    cut, empty = sum(len(tokens) > max_tokens for tokens in samples), sum(not tokens for tokens in samples)
    _warn(cut, empty, len(samples), max_tokens, report)
    made = CalibrationBlocks(blocks, cut, empty)
    if made.tokens < MINIMUM_TOKENS:
        raise WorkerError(
            f"the calibration text gives {made.tokens} tokens, {len(blocks)} blocks of {max_tokens}: at least "
            f"{MINIMUM_TOKENS} are needed; add text to {request['calibration']}, raise `calibration.samples` or "
            "lower `calibration.max_tokens`"
        )
    return made


def _split(tokens: Iterator[int], size: int) -> Iterator[list[int]]:
    """Split tokens into blocks; what is left over at the end, less than one block, is not used."""
    while len(block := list(islice(tokens, size))) == size:
        yield block


def _packed(conversations: list[list[int]], size: int) -> list[list[int]]:
    """Put each conversation into the first block that has room for it."""
    blocks: list[list[int]] = []
    for tokens in conversations:
        block = next((block for block in blocks if len(block) + len(tokens) <= size), None)
        if block is None:
            blocks.append(list(tokens))
        else:
            block.extend(tokens)
    return blocks


def _shortened(chat: list[dict[str, str]], size: int, encode: Callable[[Any], list[int]]) -> list[int]:
    """The longest beginning of a conversation, in whole messages, that fits; nothing if what is said first does not.

    Instructions alone are no conversation, and some templates refuse them.
    """
    first = next((count for count, message in enumerate(chat, 1) if message["role"] not in _INSTRUCTIONS), len(chat))
    fitting = bisect.bisect_right(range(first, len(chat)), size, key=lambda count: len(encode(chat[:count])))
    return encode(chat[: first + fitting - 1]) if fitting else []


def _warn(cut: int, empty: int, samples: int, max_tokens: int, report: Report) -> None:
    """Warn of samples that are mostly cut or mostly empty."""
    if cut > _MOST * samples:
        report(
            f"warning: {cut / samples:.0%} of {samples} calibration samples are longer than `calibration.max_tokens`, "
            f"{max_tokens}, and were cut: raise it"
        )
    if empty > _MOST * samples:
        report(f"warning: {empty / samples:.0%} of {samples} calibration samples hold no token: use other data")


def _renderer(source: Path, template: str | None) -> Callable[[Any], str]:
    """Give ``messages → text`` by the chat template."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if (template or tokenizer.chat_template) is None:
        raise WorkerError(
            "the calibration data holds conversations, and the model has no chat template: name one by "
            "`serve: {chat_template: file:PATH}`, or use rows of `text`"
        )

    def render(messages: list[dict[str, str]]) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
        except (TemplateError, ValueError) as error:
            raise WorkerError(f"the chat template can't render a calibration conversation: {error}") from error

    return render


def _encoder(source: Path) -> Callable[[str, bool], list[int]]:
    """Give ``text, whether to add special tokens → token ids``, the same whatever transformers the environment has."""
    if (source / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return lambda text, special: list(tokenizer.encode(text, add_special_tokens=special).ids)
    from transformers import AutoTokenizer

    older = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return lambda text, special: list(older.encode(text, add_special_tokens=special))
