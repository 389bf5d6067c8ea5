"""Writes one file of a branch in a Git repository, in one commit that others see whole or not at all.

No work tree is checked out: the commit is made from the branch's tree, so that no link of the repository is followed,
and neither hooks nor filters run. Only git talks to the repository; credentials are those of its own helpers and of
the SSH agent.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.errors import PublishError
from pipeline.settings import Settings
from registry.follow import GitPlace
from registry.terminal import printable

SECONDS = 120.0
"""How long writing a file may take, all attempts together."""
_ATTEMPTS = 6
# The largest file that git may write: what it fetches, and what the server says.
_LARGEST_BYTES = 512 * 2**20
_LONGEST_ANSWER, _LONGEST_REASON = 65536, 600
_AUTHOR = {"NAME": "Slipway", "EMAIL": "slipway@localhost"}
_FILE, _FOLDER = {"100644", "100755"}, "040000"
_CONFIGURED = ("-c", "core.hooksPath=/dev/null", "-c", "http.sslVerify=true", "-c", "safe.bareRepository=all")
_USER = re.compile(r"(?<=://)[^/@\s]+@")


class _RefusedError(PublishError):
    """Git ended with an error; the message is the reason that it gave."""


def write_file(place: GitPlace, content: str, message: str, settings: Settings, seconds: float = SECONDS) -> str:
    """Commit ``content`` as the file, and push it; return the commit that has it.

    Where the file is so already, nothing is pushed. Where others push at the same time, the commit is made again on
    top of theirs; nothing is forced.

    Raises:
        PublishError: the repository or its branch can't be reached, the path leads through a link, or the push was
            refused; or git can't run here.
    """
    scratch = settings.home / "scratch"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch, prefix="git-", ignore_cleanup_errors=True) as folder:
            git = _Git(Path(folder), settings.git_environment, time.monotonic() + seconds)
            git.run("init", "--bare", "--quiet", "--template=", ".")
            return _written(git, place, content, message)
    except (_RefusedError, OSError) as error:
        raise PublishError(f"can't write {place}: {error}") from error


def _written(git: _Git, place: GitPlace, content: str, message: str) -> str:
    tip = _tip(git, place)
    for attempt in range(_ATTEMPTS):
        tree = _tree(git, tip, place.path, content)
        if tree is None:
            return tip
        commit = git.run("commit-tree", tree, "-p", tip, "-F", "-", given=message)
        try:
            git.run("push", "--quiet", "--no-verify", "--", place.repository, f"{commit}:refs/heads/{place.branch}")
        except _RefusedError:
            before, tip = tip, _tip(git, place)
            if tip == before:  # nobody was faster: the repository refuses this push
                raise
            time.sleep(random.uniform(0, 0.1 * 2**attempt))  # noqa: S311 - parts two that push at the same time
        else:
            return commit
    raise PublishError(f"can't write {place}: others pushed first, {_ATTEMPTS} times: try again")


def _tip(git: _Git, place: GitPlace) -> str:
    """Fetch the branch's newest commit, and return its id."""
    options = ("--quiet", "--depth=1", "--no-tags", "--no-recurse-submodules")
    git.run("fetch", *options, "--", place.repository, f"refs/heads/{place.branch}")
    return git.run("rev-parse", "--verify", "FETCH_HEAD")


def _tree(git: _Git, tip: str, path: str, content: str) -> str | None:
    """Make the tree of a commit with the file changed; None where it has that content."""
    for folder in reversed(PurePosixPath(path).parents[:-1]):
        mode, _ = _entry(git, tip, str(folder))
        if mode not in (None, _FOLDER):
            raise _RefusedError(f"`{folder}` is a link, a file or a submodule there, not a folder")
    mode, there = _entry(git, tip, path)
    if mode is not None and mode not in _FILE:
        raise _RefusedError(f"`{path}` is a link, a folder or a submodule there, not a file")
    blob = git.run("hash-object", "-w", "--stdin", given=content)
    if blob == there:
        return None
    git.run("read-tree", tip)
    git.run("update-index", "--add", "--cacheinfo", f"{mode or '100644'},{blob},{path}")
    return git.run("write-tree")


def _entry(git: _Git, tip: str, path: str) -> tuple[str | None, str]:
    """Return the mode and the object of a path in a commit; None where it has none."""
    said = git.run("ls-tree", "-z", tip, "--", path)
    if not said:
        return None, ""
    mode, _, found = said.partition("\t")[0].split(" ")
    return mode, found


@dataclass(frozen=True)
class _Git:
    """Runs git in a bare repository of its own, until a point of time."""

    folder: Path
    environment: Mapping[str, str]
    until: float

    def run(self, *arguments: str, given: str = "") -> str:
        """Return what a command of git prints, without the newline at its end.

        Raises:
            _RefusedError: it failed, or took too long.
        """
        command = ["prlimit", f"--fsize={_LARGEST_BYTES}", "git", *_CONFIGURED, *arguments]
        with (
            tempfile.TemporaryFile(dir=self.folder) as stdin,
            tempfile.TemporaryFile(dir=self.folder) as stdout,
            tempfile.TemporaryFile(dir=self.folder) as stderr,
        ):
            stdin.write(given.encode())
            stdin.seek(0)
            process = subprocess.Popen(
                command, cwd=self.folder, env=self._variables(), stdin=stdin, stdout=stdout, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(max(0.0, self.until - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise _RefusedError("no answer within the time that it may take") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if status and self._is_too_large():
                raise _RefusedError(
                    f"the branch's newest commit has more than {_LARGEST_BYTES >> 20} MiB, and no more is fetched: "
                    "keep the file in a smaller repository"
                )
            if status:
                stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _LONGEST_ANSWER))
                raise _RefusedError(_reason(stderr.read().decode(errors="replace")))
            stdout.seek(0)
            return stdout.read(_LONGEST_ANSWER).decode(errors="replace").rstrip("\n\0")

    def _is_too_large(self) -> bool:
        """Whether a file has the size that none may exceed: git ended where it would have written more."""
        return any(path.stat().st_size >= _LARGEST_BYTES for path in self.folder.rglob("*"))

    def _variables(self) -> dict[str, str]:
        authorities = self.environment.get("REQUESTS_CA_BUNDLE") or self.environment.get("SSL_CERT_FILE")
        return {
            **({"GIT_SSL_CAINFO": authorities} if authorities else {}),
            "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=15",
            **self.environment,
            "LC_ALL": "C",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ALLOW_PROTOCOL": "https:ssh:file",
            **{f"GIT_{role}_{key}": text for role in ("AUTHOR", "COMMITTER") for key, text in _AUTHOR.items()},
        }


def _reason(said: str) -> str:
    """Return the end of what git said, in one line; no user of an address is in it."""
    lines = [" ".join(_USER.sub("", line).split()) for line in said.splitlines() if line.strip()]
    return printable("; ".join(lines)[-_LONGEST_REASON:]) or "git gave no reason"
