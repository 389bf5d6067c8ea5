"""``slipway-registry``: pull, watch and verify releases on a machine that deploys them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from registry.errors import (
    DiskError,
    FileSystemError,
    NotFoundError,
    PullError,
    RegistryError,
    TrackingError,
    TrustPolicyError,
    VerificationError,
)
from registry.policy import Policy, Trust
from registry.pull import Pulled, pull
from registry.signing import load_trusted_keys
from registry.terminal import printable
from registry.tracking import with_credentials
from registry.verify import verify
from registry.watch import run, watch

DONE, FAILED, USAGE, REFUSED, NOT_FOUND, UNCHANGED = range(6)
EXIT_STATUSES = {
    DONE: "done",
    FAILED: "temporary failure: server unreachable, no space, or no permission to write; try again",
    USAGE: "wrong usage",
    REFUSED: "refused: not what was signed, not what the policy asks for, or the destination holds something else",
    NOT_FOUND: "no such release, alias or version",
    UNCHANGED: "unchanged (`--if-changed`)",
}


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Run one command and return its exit status. Nothing else in this distribution reads the environment."""
    options = _parser(environment).parse_args(arguments)
    try:
        command: Callable[[argparse.Namespace, Trust, str], int] = options.command
        return command(options, _trust(options), with_credentials(options.tracking_uri, environment))
    except RegistryError as error:
        _say(f"error: {error}")
        return status_of(error)


def status_of(error: RegistryError) -> int:
    """Return the exit status for an error: try again, refused, or wrong usage."""
    if isinstance(error, NotFoundError):
        return NOT_FOUND
    if isinstance(error, DiskError):
        return FAILED
    if isinstance(error, (VerificationError, PullError)):
        return REFUSED
    return USAGE if isinstance(error, (TrustPolicyError, FileSystemError)) else FAILED


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    statuses = "\n".join(f"  {status}  {meaning}" for status, meaning in EXIT_STATUSES.items())
    parser = argparse.ArgumentParser(
        "slipway-registry",
        description="Fetch and verify signed model releases.",
        epilog=f"exit status:\n{statuses}",
        formatter_class=_Raw,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--tracking-uri",
        default=environment.get("MLFLOW_TRACKING_URI", ""),
        help="address of the MLflow server or database; default: $MLFLOW_TRACKING_URI",
    )
    common.add_argument(
        "--key", action="append", type=Path, metavar="FILE",
        help="a trusted public key, or a folder of *.pub files; default: $SLIPWAY_TRUSTED_KEYS",
    )  # fmt: skip
    common.add_argument("--policy", type=Path, metavar="FILE", help="a trust policy (TOML file) instead of --key")
    common.add_argument("--json", action="store_true", help="print the result as one JSON document")
    common.set_defaults(keys=[Path(item) for item in environment.get("SLIPWAY_TRUSTED_KEYS", "").split(":") if item])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fetching = argparse.ArgumentParser(add_help=False)
    fetching.add_argument("name", metavar="NAME[@ALIAS]", help="release line; without an alias its champion")
    fetching.add_argument("destination", type=Path, help="folder for the release, absent or empty")
    fetching.add_argument("--cache", type=Path, help="folder on the same file system that keeps files for later pulls")
    fetching.add_argument(
        "--variant", metavar="VARIANT", help="a serving variant that the release must list; refused if it does not"
    )
    one = commands.add_parser(
        "pull", parents=[common, fetching], help="fetch a release and verify it before the folder appears"
    )
    one.add_argument("--replace", action="store_true", help="replace another release in the destination")
    one.add_argument(
        "--if-changed",
        action="store_true",
        help="as --replace, but exit with 5 if the destination already holds this release",
    )
    one.set_defaults(command=_pull)
    follow = commands.add_parser(
        "watch", parents=[common, fetching], help="pull each time the alias names another release"
    )
    follow.add_argument(
        "--every", type=float, default=30.0, metavar="SECONDS", help="time between two checks; default: 30"
    )
    follow.add_argument(
        "--run", type=shlex.split, default=[], metavar="COMMAND",
        help="after each pull run COMMAND FOLDER DIGEST; if it fails, run it again at the next check",
    )  # fmt: skip
    follow.set_defaults(command=_watch)
    check = commands.add_parser("verify", parents=[common], help="verify a pulled release, offline")
    check.add_argument("folder", type=Path, help="folder of a release")
    check.set_defaults(command=_verify)
    return parser


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the list of exit statuses."""


def _trust(options: argparse.Namespace) -> Trust:
    if options.policy is not None:
        return Policy.load(options.policy)
    return load_trusted_keys(options.key or options.keys)


def _pull(options: argparse.Namespace, trust: Trust, tracking_uri: str) -> int:
    pulled = pull(
        options.name, options.destination,
        tracking_uri=_given(tracking_uri), trusted_keys=trust, cache=options.cache,
        replace=options.replace or options.if_changed, variant=options.variant, progress=_say,
    )  # fmt: skip
    _report(pulled, as_json=options.json)
    return UNCHANGED if options.if_changed and pulled.already_there else DONE


def _watch(options: argparse.Namespace, trust: Trust, tracking_uri: str) -> int:
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())

    def deliver(pulled: Pulled) -> bool:
        _report(pulled, as_json=options.json)
        status = run(options.run, pulled) if options.run else 0
        if status:
            _say(f"`{shlex.join(options.run)}` exited with status {status}; it runs again at the next check")
        return status == 0

    watch(
        options.name, options.destination, deliver,
        every=options.every, stopped=stopped, tracking_uri=_given(tracking_uri), trusted_keys=trust,
        cache=options.cache, variant=options.variant, progress=_say,
    )  # fmt: skip
    return DONE


def _verify(options: argparse.Namespace, trust: Trust, _: str) -> int:
    try:
        report = verify(options.folder, trust)
    except VerificationError as error:
        for problem in error.problems:
            _say(str(problem))
        if options.json:
            problems = [{"name": problem.what, "why": problem.why} for problem in error.problems]
            _print({"verified": False, "problems": problems})
        return REFUSED
    if options.json:
        _print({"verified": True, "manifest_digest": report.manifest_digest, "problems": []})
    else:
        _show(f"{options.folder} is {report.manifest.name}, {report.manifest_digest}")
    return DONE


def pull_document(pulled: Pulled) -> dict[str, str | int | bool | None]:
    """Return what ``--json`` prints of a pull."""
    return {
        "name": pulled.name, "version": pulled.version, "alias": pulled.alias, "folder": str(pulled.folder),
        "manifest_digest": pulled.report.manifest_digest, "already_there": pulled.already_there,
        "fetched_bytes": pulled.fetched_bytes,
    }  # fmt: skip


def _report(pulled: Pulled, *, as_json: bool) -> None:
    if as_json:
        _print(pull_document(pulled))
    else:
        _show(f"{pulled.name} version {pulled.version} is in {pulled.folder}")


def _given(tracking_uri: str) -> str:
    if not tracking_uri:
        raise TrackingError("no MLflow address: give `--tracking-uri` or set `MLFLOW_TRACKING_URI`")
    return tracking_uri


def _print(document: Mapping[str, object]) -> None:
    _show(json.dumps(document))


def _show(line: str) -> None:
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()


def _say(line: str) -> None:
    sys.stderr.write(printable(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
