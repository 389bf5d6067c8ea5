"""The root of an engine's error, in logs of a real vLLM that was made to fail (`data/engine_logs`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from containers.sandbox.engine_log import MOST_CHARACTERS, Failure, by_status, is_dead, root_error

LOGS = Path(__file__).parents[2] / "data" / "engine_logs"


@pytest.mark.parametrize(
    ("name", "error", "dead"),
    [
        ("cpu_gemm_wna16", "AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'", True),
        ("noweights", "RuntimeError: Cannot find any model weights with `noweights`", True),
        (
            "dtype",
            (
                "ValidationError: 1 validation error for VllmConfig Value error, torch.float32 is not supported for "
                "quantization method auto_gptq. Supported dtypes: [torch.float16, torch.bfloat16]"
            ),
            False,
        ),
        ("sigkill", "the engine's process ended without an error message: killed by hand, or out of memory", True),
        (
            "illegal_instruction",
            ("Fatal Python error: Illegal instruction (an illegal instruction: it was built for another CPU)"),
            True,
        ),
    ],
)
def test_the_first_error_is_found_beneath_those_that_follow_from_it(name: str, error: str, *, dead: bool) -> None:
    text = (LOGS / f"{name}.log").read_text()
    assert root_error(text) == error
    assert is_dead(text) is dead


@pytest.mark.parametrize(
    ("name", "part"),
    [("toolong", "User-specified max_model_len (100000) is greater"), ("kvblocks", "KV cache")],
)
def test_a_long_message_is_cut(name: str, part: str) -> None:
    error = root_error((LOGS / f"{name}.log").read_text())
    assert error is not None
    assert part in error
    assert len(error) <= MOST_CHARACTERS


def test_the_lines_of_several_processes_may_be_mixed() -> None:
    lines = (LOGS / "noweights.log").read_text().splitlines()
    noise = "(APIServer pid=1) INFO 11-29 18:44:38 [a.py:1] waiting"
    assert root_error("\n".join(each for line in lines for each in (line, noise))) == root_error("\n".join(lines))


def test_what_is_caught_in_the_server_comes_after_what_ends_the_engine() -> None:
    caught = "Traceback (most recent call last):\n  File \"x.py\", line 1, in f\nKeyError: 'tool'\n"
    assert root_error(caught) == "KeyError: 'tool'"
    found = root_error(caught + (LOGS / "cpu_gemm_wna16.log").read_text())
    assert str(found).startswith("AttributeError")


def test_an_engine_that_says_how_its_process_ended_is_understood() -> None:
    line = (
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -4}"
    )
    found = root_error(f'Traceback (most recent call last):\n  File "x.py", line 1, in f\n{line}\n')
    assert found == "EngineCore was ended by an illegal instruction: it was built for another CPU"


def test_without_a_traceback_it_is_the_last_line_that_speaks_of_an_error() -> None:
    log = (
        'usage: server\nserver.py: error: unrecognized arguments: --x\nINFO:     1.2.3.4:5 - "GET /" 500 Server Error\n'
    )
    assert root_error(log) == "server.py: error: unrecognized arguments: --x"
    assert root_error("all is well\n") is None
    assert root_error("") is None


def test_what_the_loader_refused_is_the_reason_whatever_the_engine_says_of_it() -> None:
    why = "/model/model.safetensors: changed: another sha256 than in the manifest"
    text = (LOGS / "noweights.log").read_text()
    assert root_error(f"{text}\n(APIServer pid=1) slipway loader: refused: {why}\n") == why


def test_the_text_is_not_trusted() -> None:
    nasty = "Traceback (most recent call last):\nValueError: \x1b[31mred\x07 prompt: a user's secret\n"
    found = root_error(nasty)
    assert found == "ValueError: \\x1b[31mred\\x07 prompt: [left out]"
    assert len(str(root_error("Traceback (most recent call last):\nE: " + "x" * 10**6))) == MOST_CHARACTERS
    # Neither many tracebacks nor long lines take long, or are followed.
    assert root_error("Traceback (most recent call last):\n" * 20_000 + " " * 10**6) is None


@pytest.mark.parametrize(
    ("status", "words", "may_pass"),
    [
        (0, "ended with status 0", False),
        (1, "ended with status 1", False),
        (78, "ended with status 78 (refused to load what was not signed)", False),
        (132, "ended with status 132 (an illegal instruction: it was built for another CPU)", False),
        (137, "ended with status 137 (SIGKILL: by hand, or out of memory)", True),
        (139, "ended with status 139 (a segmentation fault)", False),
    ],
)
def test_a_status_is_told_in_words(status: int, words: str, *, may_pass: bool) -> None:
    assert by_status(status) == (words, may_pass)


def test_a_failure_is_one_line() -> None:
    failure = Failure("ended with status 1", "ValueError: no", Path("/logs/a.log"))
    assert failure.told(" before it was healthy") == (
        "ended with status 1 before it was healthy: ValueError: no; log: /logs/a.log"
    )
    assert str(Failure("was removed by someone else")) == "was removed by someone else"
