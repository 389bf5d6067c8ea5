"""The entry point of a runtime's image: ``python -m slipway_loader MODULE ARGUMENTS``, with vLLM's server as module."""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from registry.errors import Problem, RegistryError, VerificationError
from registry.served_files import MARK, REFUSAL, REFUSED, ServedFiles, check_before_start, expected_files
from slipway_loader import EXPECTED, LOAD_FORMAT, REASON, STATE, register

MANIFEST_DIGEST = "SLIPWAY_MANIFEST"
"""The digest of the one signed manifest that a mounted trust policy accepts here."""
_PLUGIN, _PLUGINS = "slipway_loader", "VLLM_PLUGINS"
# Options whose paths are not of the model.
_OTHER_PATHS = frozenset({
    "--allowed-local-media-path", "--download-dir", "--log-config-file", "--root-path", "--ssl-ca-certs",
    "--ssl-certfile", "--ssl-keyfile", "--uds",
})  # fmt: skip
# Options whose values must be signed: vLLM takes a file, a folder, or a name that a hub or its cache has.
_NAMES = (
    "--chat-template", "--config", "--default-mm-loras", "--generation-config", "--hf-config-path", "--lora-modules",
    "--model", "--reasoning-parser-plugin", "--tokenizer", "--tool-parser-plugin",
)  # fmt: skip
_KEYWORDS = {"--generation-config": ("auto", "vllm")}
# With these, vLLM loads adapters, weights or a tokenizer that nobody signed.
_UNVERIFIED = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_MODEL_REDIRECT_PATH",
    "VLLM_SERVER_DEV_MODE",
)  # fmt: skip


def prepared(arguments: Sequence[str], environment: Mapping[str, str], root: Path) -> tuple[ServedFiles, list[str]]:
    """Check everything that can be checked before vLLM starts; return the files, and the arguments for vLLM.

    Raises:
        RegistryError: Something must not be started. A VerificationError names each file or setting.
    """
    _check_plugin(environment)
    chosen = _load_format(arguments)
    if chosen not in {None, LOAD_FORMAT}:
        raise VerificationError(root, [Problem(f"--load-format {chosen}", f"only `{LOAD_FORMAT}` verifies weights")])
    expected = expected_files(root, environment.get(MANIFEST_DIGEST))
    _check_paths(arguments, root, expected)
    read = check_before_start(root, expected)
    sys.stderr.write(f"{MARK}{json.dumps({'bytes': read, 'files': len(expected.files), 'ranks': 0})}\n")
    return expected, [*arguments, "--load-format", LOAD_FORMAT]


def _check_plugin(environment: Mapping[str, str]) -> None:
    """Find what vLLM would only log: that it does not know the plugin, can't import it, or is told to leave it out."""
    found = [each for each in entry_points(group="vllm.general_plugins") if each.name == _PLUGIN]
    if not found or found[0].load() is not register:
        raise VerificationError("/", [Problem(f"plugin {_PLUGIN}", "it is not installed as this image has it")])
    allowed = environment.get(_PLUGINS)
    if allowed is not None and _PLUGIN not in allowed.split(","):
        raise VerificationError("/", [Problem(_PLUGINS, f"it leaves `{_PLUGIN}` out: add it, or unset {_PLUGINS}")])
    for name in _UNVERIFIED:
        if environment.get(name, "0") not in {"", "0"}:
            raise VerificationError("/", [Problem(name, "what vLLM loads by it is not verified: unset it")])


def _load_format(arguments: Sequence[str]) -> str | None:
    """Return the load format that is asked for. Other ways to say it, such as a file, are refused or count less."""
    found = None
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = word.replace("_", "-").partition("=")
        if option == "--load-format":
            found = value if equals else following
    return found


def _check_paths(arguments: Sequence[str], root: Path, expected: ServedFiles) -> None:
    """Refuse arguments that name files that nobody signed: a model, a tokenizer, an adapter, a configuration."""
    signed = {*expected.files, *(str(parent) for name in expected.files for parent in Path(name).parents)}
    option = ""
    for word in arguments:
        value = word
        if word.startswith("--"):
            name, _, value = word.partition("=")
            option = name.replace("_", "-").partition(".")[0]
        elif word.startswith("-"):
            option = word.partition("=")[0]
        if not value or option in _OTHER_PATHS or value in _KEYWORDS.get(option, ()):
            continue
        # argparse takes the beginning of an option for the option, if it is none itself.
        may_be = len(option) > 2 and option != "--reasoning-parser"
        must_be_signed = may_be and any(each.startswith(option) for each in _NAMES)
        named = _named(option, value) if must_be_signed else [value, *re.split(r"[\s\"'=,]+", value)]
        for path in named:
            home = os.path.expanduser(path)  # noqa: PTH111 - leaves `~nobody` as it is, where `Path` fails
            name = os.path.normpath(Path.cwd() / home).lstrip("/")
            given = must_be_signed or ("/" in path and os.path.lexists(root / name))
            if given and name not in signed:
                raise VerificationError("/", [Problem(path, f"not among the files that were signed ({option})")])


def _named(option: str, value: str) -> list[str]:
    """Return what a value names, as vLLM reads it: an adapter is ``NAME=PATH``, or JSON."""
    if option == "--lora-modules" and "=" in value and "," not in value:
        return [value.partition("=")[2]]
    if option in {"--lora-modules", "--default-mm-loras"}:
        with contextlib.suppress(ValueError):
            document = json.loads(value)
            if isinstance(document, dict):
                paths = [document.get("path")] if option == "--lora-modules" else document.values()
                return [str(path) for path in paths]
    return [value]


def main(root: Path = Path("/")) -> None:
    """Check, and run the module in this process; a refusal here or in the engine ends it with `REFUSED`."""
    module, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="slipway-loader-") as state:
        try:
            expected, words = prepared(arguments, os.environ, root)
            (Path(state) / EXPECTED).write_bytes(expected.to_bytes())
        except VerificationError as error:
            more = f"; and {len(error.problems) - 1} more" if len(error.problems) > 1 else ""
            _refuse(f"{error.problems[0]}{more}")
        except RegistryError as error:
            _refuse(str(error))
        except PermissionError as error:
            _refuse(f"{error.filename}: the container's user can't read it")
        os.environ[STATE] = state
        sys.argv = [module, *words]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        finally:
            reason = Path(state) / REASON
            if reason.is_file():
                _refuse(reason.read_text(encoding="utf-8"))


def _refuse(reason: str) -> None:
    # Whoever writes to a volume chooses the names of its files.
    safe = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in " ".join(reason.split()))
    sys.stderr.write(f"{REFUSAL}{safe}\n")
    sys.stderr.flush()
    raise SystemExit(REFUSED)


if __name__ == "__main__":
    main()
