"""What users wrote has no place in a log that is kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from containers.sandbox.logs import keep, redacted


@pytest.mark.parametrize(
    "line",
    [
        "INFO: Received request cmpl-1: prompt: 'my secret', params: SamplingParams(n=1)",
        '{"prompt": "my secret", "max_tokens": 4}',
        "ValueError: messages=[{'role': 'user', 'content': 'my secret'}]",
        "input: my secret",
        "Prompt = my secret",
    ],
)
def test_what_follows_the_word_prompt_is_left_out(line: str) -> None:
    assert "secret" not in redacted(line)
    assert "[left out]" in redacted(line)


@pytest.mark.parametrize(
    "line",
    [
        "INFO: Avg prompt throughput: 12.0 tokens/s, Avg generation throughput: 3.1 tokens/s",
        "error: unrecognized arguments: --no-such-option",
        "INFO 11-24 [loggers.py:1] prompt_token_ids: None",
        "torch.OutOfMemoryError: CUDA out of memory",
    ],
)
def test_what_a_person_needs_is_kept(line: str) -> None:
    assert redacted(line) == line


def test_a_log_that_can_not_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    container = SimpleNamespace(name="one", logs=lambda **_: [b"2026 started\n", b"\x1b[2Jnow\n"])
    path = keep(container, tmp_path / "logs")  # type: ignore[arg-type]
    assert path is not None
    assert path.read_text() == "2026 started\n\\x1b[2Jnow\n"
    (tmp_path / "full").write_text("a file where the folder belongs: as unwritable as a full disk")
    assert keep(container, tmp_path / "full" / "logs") is None  # type: ignore[arg-type]
