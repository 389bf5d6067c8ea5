"""Counts a prompt's tokens with the release's tokenizer and chat template."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from containers.gateway.errors import ConfigurationError, Refusal

# Longer texts are counted in a thread, so that they do not block the event loop.
_AT_ONCE = 8_000

Prompt = str | list[str] | list[int] | list[list[int]]


class PromptCounter:
    """Counts prompts for one release. ``folder`` contains tokenizer.json and, for chat, a template."""

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            # Bytes of the longest token: a prompt longer than the context times this can't fit.
            self.longest = max(len(token.encode()) for token in self._tokenizer.get_vocab())
        except Exception as error:  # the library raises plain Exception
            raise ConfigurationError(f"{folder} has no readable tokenizer: {error}") from error
        self._folder = folder

    async def completion(self, prompt: Prompt, *, special: bool, most: int) -> int:
        """Count all prompts of a request; ``Refusal`` 400 if one can't fit into ``most`` tokens."""
        if prompt and isinstance(prompt, list) and isinstance(prompt[0], int):
            return len(prompt)
        texts = [prompt] if isinstance(prompt, str) else prompt
        if texts and isinstance(texts[0], list):
            return sum(len(part) for part in texts if isinstance(part, list))
        return await self._count([text for text in texts if isinstance(text, str)], special=special, most=most)

    async def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None,
        options: Mapping[str, object],
        most: int,
    ) -> int:
        """Count a conversation as rendered by the template, including the prompt for the assistant's answer."""
        template = self._template
        if template is None:
            raise Refusal(400, "no_chat_template", "this model has no chat template: use /v1/completions")
        try:
            text = template.render(messages=messages, tools=tools, add_generation_prompt=True, **self._words, **options)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise Refusal(400, "bad_messages", f"the model's chat template refuses these messages: {error}") from error
        return await self._count([text], special=False, most=most)

    async def _count(self, texts: Sequence[str], *, special: bool, most: int) -> int:
        longest = max((len(text.encode()) for text in texts), default=0)
        if longest > most * self.longest:
            raise Refusal(400, "context_length_exceeded", f"the prompt can't fit into this model's {most} tokens")
        if sum(map(len, texts)) <= _AT_ONCE:
            return self._encoded(texts, special)
        return await asyncio.to_thread(self._encoded, texts, special)

    def _encoded(self, texts: Sequence[str], special: bool) -> int:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
        return sum(len(encoding) for encoding in found)

    @cached_property
    def _configuration(self) -> dict[str, Any]:
        path = self._folder / "tokenizer_config.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    @cached_property
    def _words(self) -> dict[str, str]:
        """Return the special tokens that templates use, such as ``bos_token``."""
        found = {}
        for name, value in self._configuration.items():
            if name.endswith("_token"):
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str):
                    found[name] = text
        return found

    @cached_property
    def _template(self) -> jinja2.Template | None:
        """Load the release's chat template. It is rendered as in transformers (utils/chat_template_utils)."""
        path = self._folder / "chat_template.jinja"
        text = path.read_text() if path.exists() else self._configuration.get("chat_template")
        if isinstance(text, list):
            text = next((item["template"] for item in text if item.get("name") == "default"), None)
        if not isinstance(text, str):
            return None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _as_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
        return environment.from_string(text)

    @property
    def has_chat(self) -> bool:
        """Whether the release has a chat template."""
        return self._template is not None


def _as_json(value: Any, indent: int | None = None, **_: Any) -> str:  # noqa: ANN401 - as templates call it
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
