"""One file in a real Git repository: whole or not at all, with others at work, and links that are not followed."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.errors import PublishError
from pipeline.publishing import git_file
from pipeline.publishing.git_file import write_file
from pipeline.settings import Settings
from registry.follow import GitPlace

FILE = "clusters/prod/demo-awq.yaml"


@dataclass(frozen=True)
class Repository:
    """A bare repository with one commit on `main`, and the clone that made it."""

    path: Path
    clone: Path
    settings: Settings

    def git(self, *arguments: str) -> str:
        return git(self.path, *arguments)

    def write(self, content: str, path: str = FILE, **options: float) -> str:
        return write_file(GitPlace(str(self.path), "main", path), content, "Deploy it", self.settings, **options)

    def push_from_clone(self) -> None:
        git(self.clone, "add", "--all")
        git(self.clone, "commit", "--quiet", "--message", "By hand")
        git(self.clone, "push", "--quiet", "origin", "HEAD:main")

    def hook(self, name: str, script: str) -> None:
        place = self.path / "hooks" / name
        place.parent.mkdir(exist_ok=True)
        place.write_text(f"#!/bin/sh\n{script}\n")
        place.chmod(0o755)


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=Ann", "-c", "user.email=ann@example.org")
    done = subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def settings(home: Path, **variables: str) -> Settings:
    return Settings.read({"SLIPWAY_HOME": str(home), "PATH": os.environ["PATH"], "HOME": str(home), **variables})


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    found = Repository(tmp_path / "models.git", tmp_path / "clone", settings(tmp_path / "home"))
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", str(found.path))
    git(tmp_path, "clone", "--quiet", str(found.path), str(found.clone))
    (found.clone / "clusters").mkdir()
    (found.clone / "clusters" / "README.md").write_text("ours\n")
    found.push_from_clone()
    return found


def test_the_file_is_one_commit_on_top_of_the_branch_and_nothing_else_changes(repository: Repository) -> None:
    before = repository.git("rev-parse", "main")
    commit = repository.write("digest: 1\n")
    assert repository.git("rev-parse", "main") == commit
    assert repository.git("rev-parse", "main~1") == before
    assert repository.git("show", "--format=", "--name-only", "main") == FILE
    assert repository.git("show", f"main:{FILE}") == "digest: 1"
    assert repository.git("show", "main:clusters/README.md") == "ours"
    assert repository.git("log", "-1", "--format=%an %s", "main") == "Slipway Deploy it"


def test_a_file_that_is_so_already_is_not_committed_again(repository: Repository) -> None:
    commit = repository.write("digest: 1\n")
    assert repository.write("digest: 1\n") == commit
    assert repository.write("digest: 2\n") != commit
    assert repository.git("rev-list", "--count", "main") == "3"


def test_nothing_is_left_in_the_home(repository: Repository) -> None:
    repository.write("digest: 1\n")
    assert list((repository.settings.home / "scratch").iterdir()) == []


def test_writers_that_race_all_succeed_and_none_undoes_another(repository: Repository) -> None:
    paths = [f"clusters/{number}/demo.yaml" for number in range(3)]
    with ThreadPoolExecutor(len(paths)) as pool:
        list(pool.map(lambda path: repository.write("digest: 1\n", path), paths))
    assert repository.git("rev-list", "--count", "main") == "4"
    assert {repository.git("show", f"main:{path}") for path in paths} == {"digest: 1"}


def test_who_is_overtaken_at_the_last_moment_writes_on_top(repository: Repository, tmp_path: Path) -> None:
    """The first push finds that somebody has pushed after its fetch."""
    (repository.clone / "other.txt").write_text("theirs\n")
    git(repository.clone, "add", "--all")
    git(repository.clone, "commit", "--quiet", "--message", "By hand")
    theirs = git(repository.clone, "rev-parse", "HEAD")
    git(repository.clone, "push", "--quiet", "origin", "HEAD:refs/heads/waiting")
    unset = "unset GIT_QUARANTINE_PATH GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES"
    marker = tmp_path / "overtaken"
    repository.hook(
        "pre-receive", f"[ -e {marker} ] || {{ touch {marker}; {unset}; git update-ref refs/heads/main {theirs}; }}"
    )
    repository.write("digest: 1\n")
    assert marker.exists()
    assert repository.git("rev-parse", "main~1") == theirs
    assert repository.git("show", "main:other.txt") == "theirs"


def test_a_protected_branch_is_told_in_the_servers_words_and_stays(repository: Repository) -> None:
    repository.hook("pre-receive", "echo 'main is protected: open a merge request' >&2; exit 1")
    before = repository.git("rev-parse", "main")
    with pytest.raises(PublishError, match=r"can't write clusters/prod.* main is protected: open a merge request"):
        repository.write("digest: 1\n")
    assert repository.git("rev-parse", "main") == before


@pytest.mark.parametrize("link", ["clusters/prod", "clusters/prod/demo-awq.yaml"])
def test_a_link_in_the_repository_is_not_followed(repository: Repository, tmp_path: Path, link: str) -> None:
    place = repository.clone / link
    place.parent.mkdir(exist_ok=True, parents=True)
    place.symlink_to(tmp_path)
    repository.push_from_clone()
    before = repository.git("rev-parse", "main")
    with pytest.raises(PublishError, match="is a link"):
        repository.write("digest: 1\n")
    assert repository.git("rev-parse", "main") == before


def test_a_folder_in_place_of_the_file_is_refused(repository: Repository) -> None:
    with pytest.raises(PublishError, match="`clusters` is a link, a folder or a submodule there, not a file"):
        repository.write("digest: 1\n", "clusters")


def test_a_repository_or_branch_that_is_not_there_is_named(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"nothing\.git' does not appear to be a git repository"):
        write_file(GitPlace(str(tmp_path / "nothing.git"), "main", FILE), "a", "b", repository.settings)
    with pytest.raises(PublishError, match="couldn't find remote ref refs/heads/production"):
        write_file(GitPlace(str(repository.path), "production", FILE), "a", "b", repository.settings)


@pytest.mark.parametrize("files", [1, 150], ids=["one object", "a pack"])
def test_a_branch_that_is_too_large_is_named(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    for number in range(files):
        (repository.clone / f"weights-{number}").write_bytes(os.urandom((2 << 20) // files))
    repository.push_from_clone()
    monkeypatch.setattr(git_file, "_LARGEST_BYTES", 1 << 20)
    with pytest.raises(PublishError, match="newest commit has more than 1 MiB, and no more is fetched: keep the file"):
        repository.write("digest: 1\n")


def test_a_machine_without_git_is_told(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"can't write clusters/prod.* No such file or directory"):
        write_file(GitPlace(str(repository.path), "main", FILE), "a", "b", settings(tmp_path, PATH=str(tmp_path)))


def over_ssh(tmp_path: Path, script: str, **variables: str) -> Settings:
    """Settings with a script in place of SSH."""
    command = tmp_path / "ssh.sh"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    return settings(tmp_path / "home", GIT_SSH_COMMAND=str(command), **variables)


def write_over_ssh(configured: Settings, seconds: float = 60.0) -> None:
    place = GitPlace("ssh://git@git.example.org/models.git", "main", FILE)
    write_file(place, "digest: 1\n", "Deploy it", configured, seconds)


def test_a_server_that_does_not_answer_is_given_up_with_all_its_processes(tmp_path: Path) -> None:
    configured = over_ssh(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 600")
    began = time.monotonic()
    with pytest.raises(PublishError, match="no answer within the time"):
        write_over_ssh(configured, seconds=3.0)
    assert time.monotonic() - began < 60
    process = Path("/proc") / (tmp_path / "pid").read_text().strip()
    assert not process.exists() or "sleep" not in (process / "cmdline").read_text()


def test_git_gets_no_secret_of_slipways_and_shows_none_of_its_own(tmp_path: Path) -> None:
    secrets = {"HF_TOKEN": "hf_secret", "SLIPWAY_NOTIFY_WEBHOOK": "https://hooks.example.org/secret"}
    said = "fatal: https://ann:tok3n@git.example.org/models.git: \\033[31mdenied"
    configured = over_ssh(tmp_path, f"env > {tmp_path}/env; printf '{said}\\n' >&2; exit 1", **secrets)
    with pytest.raises(PublishError) as caught:
        write_over_ssh(configured)
    assert "https://git.example.org/models.git" in str(caught.value)
    assert not any(text in str(caught.value) for text in ("tok3n", "\033", "\n"))
    inherited = (tmp_path / "env").read_text()
    assert "GIT_TERMINAL_PROMPT=0" in inherited
    assert not any(secret in inherited for secret in secrets.values())


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"core.hooksPath": "{0}/hooks"}, None),
        ({"safe.bareRepository": "explicit"}, None),
        ({"url.ext::sh -c touch% {0}/ran .insteadOf": "{1}"}, "transport 'ext' not allowed"),
    ],
)
def test_a_users_configuration_makes_nothing_run(
    repository: Repository, tmp_path: Path, setting: Mapping[str, str], told: str | None
) -> None:
    ours = tmp_path / "hooks"
    ours.mkdir()
    for name in ("pre-push", "post-index-change"):
        (ours / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        (ours / name).chmod(0o755)
    repository.settings.home.mkdir(exist_ok=True)
    for key, value in setting.items():
        path = str(repository.settings.home / ".gitconfig")
        git(tmp_path, "config", "--file", path, key.format(tmp_path), value.format(tmp_path, repository.path))
    if told is None:
        repository.write("digest: 1\n")
    else:
        with pytest.raises(PublishError, match=told):
            repository.write("digest: 1\n")
    assert not (tmp_path / "ran").exists()
