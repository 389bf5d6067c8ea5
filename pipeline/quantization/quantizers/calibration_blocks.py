"""Calibration samples as blocks of tokens, each of exactly ``max_tokens``, for the quantizers' workers.

Conversations go through the chat template and lie whole in a block, as many as fit. Of one that is longer than a block
the last messages are left out. Texts fill what conversations leave, and are split where a block ends. What then
still lacks is filled with end-of-text tokens; without conversations nothing is.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from slipway_worker import Report, WorkerError

# Fewer tokens than this say nothing about what a layer sees.
MINIMUM_TOKENS = 512
# From this share on, samples that are cut or empty are worth a warning.
_MOST = 0.5


def calibration_blocks(request: dict[str, Any], report: Report) -> list[list[int]]:
    """Turn the samples of a `QuantizationRequest` into blocks; warn where most are cut or empty.

    Raises:
        WorkerError: there are too few tokens, or the chat template can't render a conversation.
    """
    max_tokens, samples = request["max_tokens"], request["texts"]
    encode = _encoder(Path(request["source"]))
    texts = [encode(each, True) for each in samples if isinstance(each, str)]
    chats = [each for each in samples if not isinstance(each, str)]
    render, filler = _renderer(Path(request["source"]), request["chat_template"]) if chats else (str, 0)
    rendered = [encode(render(each), False) for each in chats]
    whole = [
        tokens if len(tokens) <= max_tokens else _shortened(chat, max_tokens, lambda chat: encode(render(chat), False))
        for chat, tokens in zip(chats, rendered, strict=True)
    ]
    _warn([*texts, *rendered], max_tokens, report)
    rest = iter([token for tokens in texts for token in tokens[:max_tokens]])
    blocks = _packed([tokens for tokens in whole if tokens], max_tokens)
    for block in blocks:
        block.extend(islice(rest, max_tokens - len(block)))
    used = sum(map(len, blocks))
    if padding := len(blocks) * max_tokens - used:
        report(f"conversations leave {padding / (len(blocks) * max_tokens):.0%} of their calibration blocks empty")
        for block in blocks:
            block.extend([filler] * (max_tokens - len(block)))
    blocks += _split(rest, max_tokens)
    tokens = sum(map(len, blocks)) - padding
    if tokens < MINIMUM_TOKENS:
        raise WorkerError(
            f"the calibration text gives {tokens} tokens, {len(blocks)} blocks of {max_tokens}: at least "
            f"{MINIMUM_TOKENS} are needed; add text to {request['calibration']}, raise `calibration.samples` or "
            "lower `calibration.max_tokens`"
        )
    return blocks


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
    """The longest beginning of a conversation, in whole messages, that fits; nothing if the first does not."""
    kept = bisect.bisect_right(range(1, len(chat)), size, key=lambda count: len(encode(chat[:count])))
    return encode(chat[:kept]) if kept else []


def _warn(samples: list[list[int]], max_tokens: int, report: Report) -> None:
    """Warn of samples that are mostly cut or mostly empty."""
    cut = sum(len(tokens) > max_tokens for tokens in samples) / max(1, len(samples))
    empty = sum(not tokens for tokens in samples) / max(1, len(samples))
    if cut > _MOST:
        report(
            f"warning: {cut:.0%} of {len(samples)} calibration samples are longer than `calibration.max_tokens`, "
            f"{max_tokens}, and were cut: raise it"
        )
    if empty > _MOST:
        report(f"warning: {empty:.0%} of {len(samples)} calibration samples hold no token: use other data")


def _renderer(source: Path, template: str | None) -> tuple[Callable[[Any], str], int]:
    """Give ``messages → text`` by the chat template, and the token that ends a text."""
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

    return render, tokenizer.eos_token_id or 0


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
