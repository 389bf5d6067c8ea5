"""Promotion and pull against a real MLflow: what is refused, what a death leaves behind, what a server changes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from release_folder import FILES, forged, make_release, passing

from registry import Pulled, VerificationError, fetch_file, pull, verify
from registry.__main__ import main
from registry.catalog import Version, champion_digest, current, line, lines, names
from registry.embedded import Embedded
from registry.errors import DiskError, PromotionError, PullError, RegistryError, TrackingError
from registry.policy import Policy, Trust
from registry.promote import promote
from registry.signing import SigningKey, load_or_create_key
from registry.tracking import connected, local_folder
from registry.verdict import Verdict
from registry.watch import watch

TESTS = Path(__file__).parent.parent
CHECKOUT = TESTS.parent


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return load_or_create_key(tmp_path_factory.mktemp("keys") / "release.pem")


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: it takes seconds."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    with connected(f"sqlite:///{path}"):
        return path


@pytest.fixture
def uri(tmp_path: Path, empty_database: Path) -> str:
    (tmp_path / "mlflow").mkdir()
    shutil.copy(empty_database, tmp_path / "mlflow" / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow/mlflow.db"


@pytest.fixture
def releases(tmp_path: Path, key: SigningKey) -> list[Path]:
    """Three releases of one line, which share no file."""
    folders = [tmp_path / f"release-{number}" for number in range(3)]
    for number, folder in enumerate(folders):
        files = {name: data + b" " * number for name, data in FILES.items()}
        make_release(folder, key, files=files, created=f"2026-11-24T01:02:0{number}Z")
    return folders


def by_alias(uri: str, name: str = "demo-awq") -> dict[str, str]:
    return {alias: version.version for version in current(uri, name) for alias in version.aliases}


def stored(version: Version) -> Path:
    folder = local_folder(version.location)
    assert folder is not None
    return folder


def test_each_release_becomes_champion_and_the_one_before_is_kept(
    uri: str, releases: list[Path], key: SigningKey
) -> None:
    for folder in releases:
        promote(folder, uri, [key.public])
    assert by_alias(uri) == {"candidate": "3", "champion": "3", "previous": "2"}
    assert champion_digest(uri, "demo-awq") == verify(releases[2], [key.public]).manifest_digest
    assert names(uri) == ["demo-awq"]
    assert [version.version for version in lines(uri, "demo")] == ["3", "2", "1"]
    assert lines(uri) == lines(uri, "demo-awq") == lines(uri, "demo")
    assert lines(uri, "dem") == []


def test_files_on_this_machine_are_registered_without_a_copy(uri: str, releases: list[Path], key: SigningKey) -> None:
    promote(releases[0], uri, [key.public])
    folder = stored(current(uri, "demo-awq")[0])
    assert (folder / "model.safetensors").samefile(releases[0] / "model.safetensors")
    assert verify(folder, [key.public]) == verify(releases[0], [key.public])


def test_an_upload_that_is_whole_is_registered_by_the_next_promotion(
    uri: str, releases: list[Path], key: SigningKey, tmp_path: Path
) -> None:
    (tmp_path / "key.pub").write_bytes(key.public.pem())
    script = DIE.rpartition("print(")[0]
    subprocess.run(
        [sys.executable, "-c", script, str(releases[0]), uri, str(tmp_path / "key.pub"), "log_batch:1"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT), "MLFLOW_DISABLE_TELEMETRY": "true"},
        check=True,
    )
    models = tmp_path / "mlflow/artifacts/models"
    (uploaded,) = models.iterdir()
    assert current(uri, "demo-awq") == []
    promote(releases[0], uri, [key.public])
    assert list(models.iterdir()) == [uploaded]
    assert stored(current(uri, "demo-awq")[0]).parent == uploaded


def test_promoting_again_registers_nothing_anew(uri: str, releases: list[Path], key: SigningKey) -> None:
    first = promote(releases[0], uri, [key.public])
    again = promote(releases[0], uri, [key.public])
    assert (first.version, first.reused, again.version, again.reused) == ("1", False, "1", True)
    promote(releases[1], uri, [key.public])
    back = promote(releases[0], uri, [key.public])
    assert (back.version, back.reused, back.replaced) == ("1", True, "2")
    assert by_alias(uri) == {"candidate": "1", "champion": "1", "previous": "2"}


def test_the_table_reader_and_mlflow_give_the_same_answer(uri: str, releases: list[Path], key: SigningKey) -> None:
    for folder in releases:
        promote(folder, uri, [key.public])
    with connected(uri) as client:
        client.delete_model_version("demo-awq", "2")
        assert current(uri, "demo-awq") == Embedded(client).versions("demo-awq")
        assert line(uri, "demo-awq") == Embedded(client).line("demo-awq")
        assert [version.version for version in current(uri, "demo-awq")] == ["3", "1"]
        assert current(uri, "absent") == Embedded(client).versions("absent") == []
        assert line(uri, "absent") is Embedded(client).line("absent") is None


def test_a_manual_champion_stays_until_it_is_told(uri: str, releases: list[Path], key: SigningKey) -> None:
    promote(releases[0], uri, [key.public])
    promotion = promote(releases[1], uri, [key.public], champion="manual")
    assert promotion.aliases == ("candidate",)
    assert by_alias(uri) == {"candidate": "2", "champion": "1"}


def test_mlflow_shows_what_the_gates_measured(uri: str, tmp_path: Path, key: SigningKey) -> None:
    manifest = make_release(tmp_path / "dotted", key, model="llama-3.1-8b", scheme="gptq")
    promote(tmp_path / "dotted", uri, [key.public])
    with connected(uri) as client:
        version = client.get_model_version_by_alias("llama-3.1-8b-gptq", "champion")
        assert version.tags["slipway.manifest_digest"] == manifest.digest
        assert version.tags["slipway.gate.scan"] == "pass"
        assert version.run_id is not None
        run = client.get_run(version.run_id)
        assert run.data.metrics["drift.p95"] == 0.25
        assert run.info.status == "FINISHED"


def _failing(folder: Path, key: SigningKey) -> None:
    failed = Verdict(gate="scan", status="fail", reason="one CRITICAL")
    make_release(folder, key, verdicts=[failed, passing("drift"), passing("load")])


def _ungated(folder: Path, key: SigningKey) -> None:
    make_release(folder, key, verdicts=[passing("drift"), passing("load")])


def _altered(folder: Path, key: SigningKey) -> None:
    make_release(folder, key)
    (folder / "model.safetensors").write_bytes(b"other")


def _unsigned(folder: Path, key: SigningKey) -> None:
    make_release(folder, key)
    (folder / "release/signature.json").unlink()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_failing, "gate scan: fail: one CRITICAL"),
        (_ungated, "gate scan: the release has no verdict"),
        (_altered, r"model\.safetensors: changed"),
        (_unsigned, r"release/signature\.json: missing"),
    ],
)
def test_what_may_not_be_promoted_is_refused_before_anything_is_touched(
    tmp_path: Path, key: SigningKey, prepare: Callable[[Path, SigningKey], None], message: str
) -> None:
    prepare(tmp_path / "release", key)
    with pytest.raises(PromotionError, match=message):
        promote(tmp_path / "release", f"sqlite:///{tmp_path}/mlflow/mlflow.db", [key.public])
    assert not (tmp_path / "mlflow").exists()


def test_a_registered_version_that_was_altered_since_becomes_no_champion(
    uri: str, releases: list[Path], key: SigningKey
) -> None:
    promote(releases[0], uri, [key.public])
    promote(releases[1], uri, [key.public], champion="manual")
    altered = stored(current(uri, "demo-awq")[0]) / "config.json"
    altered.unlink()  # it is the release's own, by another name
    altered.write_bytes(b"{}")
    with pytest.raises(PromotionError, match=r"version 2 of `demo-awq` is not what was signed: config\.json: changed"):
        promote(releases[1], uri, [key.public])
    assert by_alias(uri) == {"candidate": "2", "champion": "1"}


DIE = """
import os, signal, sys
from pathlib import Path
import mlflow
from registry.promote import promote
from registry.signing import load_trusted_keys

folder, uri, public = sys.argv[1:4]

def dying(method, call, when):
    left = int(call)
    def wrapped(*arguments, **options):
        nonlocal left
        left -= 1
        if left == 0 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(*arguments, **options)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

def attempt(name=None, call=None, when=None):
    child = os.fork()
    if child == 0:
        if name:
            owner = os if name == "link" else mlflow.MlflowClient
            setattr(owner, name, dying(getattr(owner, name), call, when))
        promote(Path(folder), uri, load_trusted_keys([Path(public)]))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for step in sys.argv[4:]:
    for when in ("before", "after"):
        print(step, when, attempt(*step.split(":"), when), flush=True)
print("end", "end", attempt(), flush=True)
"""

UPLOAD = ["create_run:1", "create_logged_model:1", "link:3", "log_batch:1", "set_terminated:1"]
REGISTER = ["finalize_logged_model:1", "create_model_version:1"]
# The journal's entry, each alias, and the entry again as done.
MOVE = ["set_registered_model_tag:1", "set_registered_model_alias:1", "set_registered_model_alias:2"]
DONE = ["set_registered_model_tag:1"]


@pytest.mark.parametrize(
    ("earlier", "steps", "aliases"),
    [
        (
            0,
            ["create_experiment:1", *UPLOAD, *REGISTER[:1], "create_registered_model:1", *REGISTER[1:], *MOVE, *DONE],
            {"candidate": "1", "champion": "1"},
        ),
        (
            1,
            [*UPLOAD, *REGISTER, *MOVE, "set_registered_model_alias:3", *DONE],
            {"candidate": "2", "champion": "2", "previous": "1"},
        ),
    ],
    ids=["the first release", "the next release"],
)
def test_a_promotion_killed_at_any_step_is_completed_by_the_next(
    uri: str,
    releases: list[Path],
    key: SigningKey,
    tmp_path: Path,
    earlier: int,
    steps: list[str],
    aliases: dict[str, str],
) -> None:
    (tmp_path / "key.pub").write_bytes(key.public.pem())
    for folder in releases[:earlier]:
        promote(folder, uri, [key.public])
    done = subprocess.run(
        [sys.executable, "-c", DIE, str(releases[earlier]), uri, str(tmp_path / "key.pub"), *steps],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT), "MLFLOW_DISABLE_TELEMETRY": "true"},
        capture_output=True,
        text=True,
        check=True,
    )
    died = {f"{step} {when} -9" for step in steps for when in ("before", "after")}
    assert died | {"end end 0"} == set(done.stdout.splitlines())
    assert by_alias(uri) == aliases
    assert len(current(uri, "demo-awq")) == earlier + 1
    for version in current(uri, "demo-awq"):
        verify(stored(version), [key.public])
    assert len(list((tmp_path / "mlflow/artifacts/models").iterdir())) == earlier + 1


def test_tables_half_made_by_a_killed_process_are_never_opened(tmp_path: Path) -> None:
    database, beside = tmp_path / "mlflow.db", tmp_path / ".mlflow.db.new"
    script = "import sys; from registry.tracking import prepare; prepare(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", script, f"sqlite:///{database}"], cwd=CHECKOUT)
    while not (beside.exists() and beside.stat().st_size > 100_000):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not database.exists()
    assert names(f"sqlite:///{database}") == []
    with connected(f"sqlite:///{database}") as client:
        client.create_registered_model("demo-awq")
    assert names(f"sqlite:///{database}") == ["demo-awq"]
    assert not beside.exists()


def test_promoters_at_once_take_turns(uri: str, releases: list[Path], key: SigningKey, tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_bytes(key.public.pem())
    script = (
        "import sys; from pathlib import Path; from registry.promote import promote;"
        "from registry.signing import load_trusted_keys;"
        "promote(Path(sys.argv[1]), sys.argv[2], load_trusted_keys([Path(sys.argv[3])]))"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT)}
    promoters = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder), uri, str(tmp_path / "key.pub")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for folder in [*releases, releases[0]]
    ]
    said = [promoter.communicate()[0] for promoter in promoters]
    assert [promoter.returncode for promoter in promoters] == [0] * 4, said
    assert said == [b""] * 4, "MLflow keeps quiet"
    assert len(current(uri, "demo-awq")) == 3
    aliases = by_alias(uri)
    assert aliases["champion"] == aliases["candidate"] != aliases["previous"]


def test_a_pulled_release_is_whole_readable_and_pulled_once(
    uri: str, releases: list[Path], key: SigningKey, tmp_path: Path
) -> None:
    promote(releases[0], uri, [key.public])
    destination = tmp_path / "new" / "folder"
    pulled = pull("demo-awq@champion", destination, tracking_uri=uri, trusted_keys=[key.public])
    assert (pulled.version, pulled.alias, pulled.already_there) == ("1", "champion", False)
    assert {name: (destination / name).read_bytes() for name in FILES} == FILES
    assert destination.stat().st_mode & 0o777 == 0o755
    assert (destination / "config.json").stat().st_mode & 0o777 == 0o644
    assert pull("demo-awq", destination, tracking_uri=uri, trusted_keys=[key.public]).already_there
    assert [entry.name for entry in destination.parent.iterdir()] == ["folder"]


def test_one_file_is_fetched_as_it_was_signed(uri: str, releases: list[Path], key: SigningKey, tmp_path: Path) -> None:
    promote(releases[0], uri, [key.public])
    target = tmp_path / "reports" / "r.html"
    fetch_file("demo-awq", "release/report.html", target, tracking_uri=uri, trusted_keys=[key.public])
    assert target.read_bytes() == FILES["release/report.html"]
    with pytest.raises(PullError, match=r"did you mean `release/report\.html`"):
        fetch_file("demo-awq", "release/report.htm", target, tracking_uri=uri, trusted_keys=[key.public])
    (stored(current(uri, "demo-awq")[0]) / "release/report.html").write_bytes(b"<!doctype HTML>")
    with pytest.raises(VerificationError, match=r"report\.html: changed"):
        fetch_file("demo-awq", "release/report.html", target, tracking_uri=uri, trusted_keys=[key.public])
    assert target.read_bytes() == FILES["release/report.html"]
    assert [entry.name for entry in target.parent.iterdir()] == ["r.html"]


def test_a_destination_that_is_taken_is_left_alone(
    uri: str, releases: list[Path], key: SigningKey, tmp_path: Path
) -> None:
    promote(releases[0], uri, [key.public])
    taken = tmp_path / "taken"
    taken.mkdir()
    pull("demo-awq", taken, tracking_uri=uri, trusted_keys=[key.public])  # an empty folder is nobody's
    promote(releases[1], uri, [key.public])
    with pytest.raises(PullError, match="holds another release"):
        pull("demo-awq", taken, tracking_uri=uri, trusted_keys=[key.public])
    (taken / "mine").write_text("keep")
    with pytest.raises(PullError, match=r"mine: extra.*another destination"):
        pull("demo-awq", taken, tracking_uri=uri, trusted_keys=[key.public])
    assert (taken / "mine").read_text() == "keep"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("demo-aqw", "did you mean `demo-awq`"),
        ("demo-awq@champoin", "did you mean `champion`"),
        ("demo-awq@previous", "`demo-awq` has no alias `previous`"),
        ("demo-awq@", "names no release"),
        ("../demo", "names no release"),
        ("a@b@c", "names no release"),
    ],
)
def test_what_does_not_exist_is_said_with_what_does(
    uri: str, releases: list[Path], key: SigningKey, tmp_path: Path, reference: str, message: str
) -> None:
    promote(releases[0], uri, [key.public])
    with pytest.raises(PullError, match=message):
        pull(reference, tmp_path / "out", tracking_uri=uri, trusted_keys=[key.public])


def test_pulling_from_nothing_makes_nothing(tmp_path: Path, key: SigningKey) -> None:
    with pytest.raises(PullError, match="there are none yet"):
        pull("demo-awq", tmp_path / "out", tracking_uri=f"sqlite:///{tmp_path}/none.db", trusted_keys=[key.public])
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_is_none_is_said_so(tmp_path: Path, key: SigningKey) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(TrackingError, match="can't be read as MLflow's database"):
        pull("demo-awq", tmp_path / "out", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", trusted_keys=[key.public])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _replay(folder: Path) -> None:
    """Put the files of the older release where the newer one's are: both are signed."""
    older = folder.parents[4] / "release-0"
    shutil.rmtree(folder)
    shutil.copytree(older, folder)


def _edit(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "release/manifest.json"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def _swap_image(folder: Path) -> None:
    _edit(
        folder,
        b'"digest":"sha256:' + b"ab" * 32 + b'","minimum_driver"',
        b'"digest":"sha256:' + b"cd" * 32 + b'","minimum_driver"',
    )


def _pass_the_scan(folder: Path) -> None:
    _edit(folder, b'"reason":"within its limits","status":"pass"', b'"reason":"as good as new","status":"pass"')


def _sign_by_another(folder: Path) -> None:
    forged(folder, load_or_create_key(folder.parents[4] / "stranger.pem"), {})


def _escape(folder: Path) -> None:
    """Even by who holds a key: here a stranger's, and the path is named before the signature is believed."""
    files = json.loads((folder / "release/manifest.json").read_bytes())["files"]
    stranger = load_or_create_key(folder.parents[4] / "stranger.pem")
    forged(folder, stranger, {"files": files | {"../escaped": {"sha256": "0" * 64, "size": 1}}})


def _link(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda folder: _flip(folder / "model.safetensors"), r"model\.safetensors: changed"),
        (lambda folder: _flip(folder / "tokenizer.json"), r"tokenizer\.json: changed"),
        (
            lambda folder: _flip(folder / "release/manifest.json"),
            r"release/signature\.json: it is not over this manifest",
        ),
        (lambda folder: _flip(folder / "release/signature.json"), r"release/signature\.json"),
        (lambda folder: (folder / "extra.bin").write_bytes(b""), r"`extra\.bin` is extra"),
        (lambda folder: (folder / "config.json").unlink(), r"`config\.json` is missing"),
        (lambda folder: (folder / "release/manifest.json").unlink(), "not a signed release"),
        (_link, "symlink"),
        (_swap_image, r"release/signature\.json: it is not over this manifest"),
        (_pass_the_scan, r"release/signature\.json: it is not over this manifest"),
        (_sign_by_another, r"release/signature\.json: signed by key .*, which is not trusted"),
        (_escape, r"release/manifest\.json: .*`\.\./escaped` is not a plain relative path"),
        (lambda folder: (folder / "release/provenance.json").unlink(), r"release/provenance\.json: missing"),
        (_replay, r"release/manifest\.json: its digest is sha256:.*as expected"),
    ],
)
def test_what_was_tampered_with_never_arrives(
    uri: str,
    releases: list[Path],
    key: SigningKey,
    tmp_path: Path,
    tamper: Callable[[Path], None],
    message: str,
) -> None:
    promote(releases[0], uri, [key.public])
    promote(releases[1], uri, [key.public])
    tamper(stored(current(uri, "demo-awq")[0]))
    with pytest.raises(RegistryError, match=message):
        pull("demo-awq", tmp_path / "out/of/here", tracking_uri=uri, trusted_keys=[key.public])
    assert not (tmp_path / "out").exists()
    pull("demo-awq@previous", tmp_path / "held", tracking_uri=uri, trusted_keys=[key.public])
    with pytest.raises(RegistryError, match=message):
        pull("demo-awq", tmp_path / "held", tracking_uri=uri, trusted_keys=[key.public], replace=True)
    assert verify(tmp_path / "held", [key.public]).manifest_digest == verify(releases[0], [key.public]).manifest_digest


def test_a_release_of_another_line_or_key_never_arrives(uri: str, tmp_path: Path, key: SigningKey) -> None:
    make_release(tmp_path / "release", key)
    promote(tmp_path / "release", uri, [key.public])
    with connected(uri) as client:
        version = client.get_model_version_by_alias("demo-awq", "champion")
        client.create_registered_model("other-awq")
        client.create_model_version("other-awq", source=version.source, tags=dict(version.tags))
        client.set_registered_model_alias("other-awq", "champion", "1")
        client.create_registered_model("foreign")
        client.create_model_version("foreign", source=version.source)
        client.set_registered_model_alias("foreign", "champion", "1")
    for name, message in (("other-awq", "holds the release `demo-awq`"), ("foreign", "not registered by Slipway")):
        with pytest.raises(PullError, match=message):
            pull(name, tmp_path / "out", tracking_uri=uri, trusted_keys=[key.public])
    stranger = load_or_create_key(tmp_path / "stranger.pem")
    with pytest.raises(VerificationError, match="not trusted"):
        pull("demo-awq", tmp_path / "out", tracking_uri=uri, trusted_keys=[stranger.public])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["http", "file", "beside"])
def test_a_location_outside_the_registry_is_never_asked_nor_read(
    uri: str, tmp_path: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Whoever may register a version chooses its `source`; MLflow's client would send it user and password."""
    make_release(tmp_path / "release", key)
    promote(tmp_path / "release", uri, [key.public])
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "operator")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    with socket.create_server(("127.0.0.1", 0)) as attacker:
        attacker.settimeout(0.2)
        source = {
            "http": f"http://127.0.0.1:{attacker.getsockname()[1]}/release",
            "file": (tmp_path / "release").as_uri(),
            "beside": f"{stored(current(uri, 'demo-awq')[0]).parent.parent.as_uri()}/../../../release",
        }[place]
        with connected(uri) as client:
            tags = dict(client.get_model_version_by_alias("demo-awq", "champion").tags)
            number = client.create_model_version("demo-awq", source=source, tags=tags).version
        with pytest.raises(PullError, match="outside its artifact store"):
            pull(f"demo-awq@v{number}", tmp_path / "out", tracking_uri=uri, trusted_keys=[key.public])
        with pytest.raises(TimeoutError):
            attacker.accept()
    assert not (tmp_path / "out").exists()


def test_what_a_killed_pull_left_is_swept_and_never_used(
    uri: str, releases: list[Path], key: SigningKey, tmp_path: Path
) -> None:
    promote(releases[0], uri, [key.public])
    script = (
        "import os, signal, sys; from pathlib import Path; from registry import pull, load_trusted_keys\n"
        "die = lambda line: os.kill(os.getpid(), signal.SIGKILL) if line.startswith('fetching') else None\n"
        "pull('demo-awq', Path(sys.argv[1]), tracking_uri=sys.argv[2],"
        " trusted_keys=load_trusted_keys([Path(sys.argv[3])]), progress=die)"
    )
    (tmp_path / "key.pub").write_bytes(key.public.pem())
    target = tmp_path / "pulled" / "here"
    killed = subprocess.run(
        [sys.executable, "-c", script, str(target), uri, str(tmp_path / "key.pub")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT)},
        check=False,
    )
    assert killed.returncode == -9
    (leftover,) = target.parent.iterdir()
    assert leftover.name.startswith(".here.part-")
    (leftover / "poison").write_bytes(b"x")
    pull("demo-awq", target, tracking_uri=uri, trusted_keys=[key.public])
    assert [entry.name for entry in target.parent.iterdir()] == ["here"]
    verify(target, [key.public])


def test_what_a_killed_pull_left_outlives_a_manifest_that_could_not_be_read_whole(
    uri: str, releases: list[Path], key: SigningKey, tmp_path: Path
) -> None:
    promote(releases[0], uri, [key.public])
    version, target = current(uri, "demo-awq")[0], tmp_path / "pulled" / "here"
    assert version.manifest_digest is not None
    part = target.with_name(f".here.part-{version.manifest_digest.removeprefix('sha256:')[:16]}")
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(FILES["model.safetensors"][:10_000])
    manifest = stored(version) / "release/manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-10])
    with pytest.raises(VerificationError):
        pull("demo-awq", target, tracking_uri=uri, trusted_keys=[key.public])
    manifest.write_bytes(whole)
    pulled = pull("demo-awq", target, tracking_uri=uri, trusted_keys=[key.public])
    assert pulled.fetched_bytes == pulled.manifest.size_bytes - 10_000


def test_a_destination_that_lost_something_is_mended_and_evidence_that_expired_is_refused(
    uri: str, releases: list[Path], key: SigningKey, tmp_path: Path
) -> None:
    promote(releases[0], uri, [key.public])
    target = tmp_path / "here"

    def again(trust: Trust) -> Pulled:
        return pull("demo-awq", target, tracking_uri=uri, trusted_keys=trust, replace=True)

    again([key.public])
    assert again([key.public]).already_there
    with (target / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    mended = again([key.public])
    assert (mended.already_there, mended.fetched_bytes) == (False, len(FILES["model.safetensors"]))
    verify(target, [key.public])
    (target / "release/signature.json").write_bytes(b"{}")
    assert not again([key.public]).already_there
    verify(target, [key.public])
    with pytest.raises(VerificationError, match="evidence: expired"):
        again(Policy((key.public,), maximum_age=timedelta(seconds=1)))
    with pytest.raises(VerificationError, match="not trusted"):
        again([load_or_create_key(tmp_path / "stranger.pem").public])
    verify(target, [key.public])


def test_an_init_container_that_is_run_again_succeeds(
    uri: str, releases: list[Path], key: SigningKey, tmp_path: Path
) -> None:
    (tmp_path / "key.pub").write_bytes(key.public.pem())
    command = ["pull", "demo-awq@champion", str(tmp_path / "models" / "demo"), "--tracking-uri", uri]
    command += ["--key", str(tmp_path / "key.pub")]
    promote(releases[0], uri, [key.public])
    assert [main([*command, "--replace"], {}) for _ in range(2)] == [0, 0]
    promote(releases[1], uri, [key.public])
    assert main(command, {}) == 3
    assert main([*command, "--replace"], {}) == 0
    assert main([*command, "--if-changed"], {}) == 5
    verify(tmp_path / "models" / "demo", [key.public])


def test_a_linked_destination_gives_way_and_what_it_points_at_stays(
    uri: str, releases: list[Path], key: SigningKey, tmp_path: Path
) -> None:
    promote(releases[0], uri, [key.public])
    place = tmp_path / "models"
    pull("demo-awq", place / "one", tracking_uri=uri, trusted_keys=[key.public])
    (place / "current").symlink_to("one")
    for release in releases[1:]:
        promote(release, uri, [key.public])
        pull("demo-awq", place / "current", tracking_uri=uri, trusted_keys=[key.public], replace=True)
        assert sorted(path.name for path in place.iterdir()) == ["current", "one"]
        (place / "current").rename(place / "two")
        (place / "current").symlink_to("two")
        shutil.rmtree(place / "one")
        (place / "two").rename(place / "one")
        (place / "current").unlink()
        (place / "current").symlink_to("one")


def test_a_disk_that_is_full_is_no_refusal(uri: str, releases: list[Path], key: SigningKey, tmp_path: Path) -> None:
    promote(releases[0], uri, [key.public])
    (tmp_path / "key.pub").write_bytes(key.public.pem())
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000));"
        "from registry.__main__ import main; sys.exit(main(sys.argv[1:], {}))"
    )
    command = [sys.executable, "-c", script, "pull", "demo-awq", str(tmp_path / "out" / "here"), "--tracking-uri", uri]
    done = subprocess.run(
        [*command, "--key", str(tmp_path / "key.pub")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[-1].split(" `")[0]) == (1, "error: can't write")
    assert not (tmp_path / "out" / "here").exists()
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(DiskError, match="the cache"):
        pull("demo-awq", tmp_path / "o", tracking_uri=uri, trusted_keys=[key.public], cache=tmp_path / "cache")


def test_the_watcher_tells_each_release_and_again_what_could_not_be_used(
    uri: str, releases: list[Path], key: SigningKey, tmp_path: Path
) -> None:
    stopped, told, waited = threading.Event(), [], []

    def wait(line: str) -> None:
        if line.startswith("waiting"):
            waited.append(line)
            promote(releases[0], uri, [key.public])

    def tell(pulled: Pulled) -> bool:
        told.append(pulled.version)
        if told == ["1", "1"]:
            promote(releases[1], uri, [key.public])
        if len(told) == 4:
            stopped.set()
        return len(told) not in (1, 3)  # the first attempt at each release fails

    watch(
        "demo-awq", tmp_path / "out", tell,
        every=0.01, stopped=stopped, tracking_uri=uri, trusted_keys=[key.public], progress=wait,
    )  # fmt: skip
    assert told == ["1", "1", "2", "2"]
    assert len(waited) == 1
    verify(tmp_path / "out", [key.public])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    """An MLflow server that keeps the files itself."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "mlflow.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(address, process, folder / "log")
            yield address
        finally:
            os.killpg(process.pid, 15)
            process.wait(120)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=1):  # noqa: S310 - a loopback address
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
    pytest.fail(f"no MLflow server: {log.read_text()}")


def test_a_server_serves_as_the_folder_does(server: str, releases: list[Path], key: SigningKey, tmp_path: Path) -> None:
    for folder in releases[:2]:
        promote(folder, server, [key.public])
    assert promote(releases[1], server, [key.public]).reused
    assert by_alias(server) == {"candidate": "2", "champion": "2", "previous": "1"}
    pulled = pull("demo-awq@previous", tmp_path / "out", tracking_uri=server, trusted_keys=[key.public])
    assert pulled.manifest == verify(releases[0], [key.public]).manifest
    with pytest.raises(PullError, match="did you mean `demo-awq`"):
        pull("demo-awk", tmp_path / "no", tracking_uri=server, trusted_keys=[key.public])
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_a_server_that_does_not_answer_is_said_so_soon_and_without_its_password(
    tmp_path: Path, key: SigningKey
) -> None:
    started = time.monotonic()
    with pytest.raises(TrackingError, match="no MLflow server answers") as caught:
        pull("demo-awq", tmp_path / "out", tracking_uri="http://me:secret@127.0.0.1:9", trusted_keys=[key.public])
    assert "secret" not in str(caught.value)
    assert time.monotonic() - started < 10


def test_the_package_imports_in_half_a_second_and_brings_nothing_heavy() -> None:
    script = (
        "import sys, time; started = time.process_time(); import registry, registry.promote, json;"
        "print(json.dumps([time.process_time() - started, sorted(sys.modules)]))"
    )
    runs = [
        json.loads(subprocess.check_output([sys.executable, "-c", script], cwd=CHECKOUT, text=True)) for _ in range(3)
    ]
    heavy = {"mlflow", "dagster", "torch", "docker", "pandas", "numpy", "pipeline", "evals", "containers"}
    assert not heavy & set(runs[0][1])
    assert min(seconds for seconds, _ in runs) < 0.5
