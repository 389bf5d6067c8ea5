"""Sources of other distributions, and what no origin may list."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import SourceError
from pipeline.sources import hub
from pipeline.sources.lock import read_lock
from pipeline.sources.origin import Found, SourceFile
from pipeline.sources.source import hold_to_lock, pull, resolve
from unit.pipeline import checkpoints

PLUGIN = """
import contextlib, io
from pathlib import Path
from pipeline.sources.origin import Found, SourceFile

class Warehouse:
    def __init__(self, uri):
        self.uri, self.pinned, self.folder = uri, None, Path(uri.removeprefix("warehouse:"))

    def find(self):
        names = sorted(path.name for path in self.folder.iterdir())
        return Found("sha256:" + "7" * 64, tuple(SourceFile(n, (self.folder / n).stat().st_size) for n in names))

    @contextlib.contextmanager
    def open(self, revision, file, start, stop=None):
        with (self.folder / file.path).open("rb") as stream:
            stream.seek(start)
            yield stream, start

def open_warehouse(uri, revision, access):
    return Warehouse(uri)
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that adds `warehouse:`, installed as pip leaves it."""
    place = tmp_path / "site"
    information = place / "slipway_warehouse-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: slipway-warehouse\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[slipway.sources]\nwarehouse = slipway_warehouse:open_warehouse\nbroken = slipway_absent:open\n"
        "file = slipway_absent:open\n"
    )
    (place / "slipway_warehouse.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "slipway_warehouse", raising=False)


@pytest.mark.usefixtures("installed")
def test_another_distribution_adds_a_scheme_that_is_pulled_and_locked_like_ours(tmp_path: Path) -> None:
    model = checkpoints.write_source(tmp_path / "model")
    resolved = resolve(f"warehouse:{model}")
    (tmp_path / "pulled").mkdir()
    found = pull(resolved, tmp_path / "pulled", tmp_path / "downloads", lambda _: None)
    assert sorted(found) == ["config.json", "model.safetensors", "tokenizer.json"]
    hold_to_lock(tmp_path / "tiny.lock.json", resolved, found)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace("llama", "llamb"))
    locked = resolve(f"warehouse:{model}", lock=read_lock(tmp_path / "tiny.lock.json"))
    (tmp_path / "again").mkdir()
    with pytest.raises(SourceError, match=r"warehouse:.*config\.json"):
        pull(locked, tmp_path / "again", tmp_path / "downloads", lambda _: None)


@pytest.mark.usefixtures("installed")
def test_a_plugin_that_fails_is_named_and_no_plugin_replaces_a_scheme_of_ours(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"the plugin for `broken:` sources \(slipway_absent:open\) fails"):
        resolve("broken:x")
    with pytest.raises(SourceError, match=r"`file:`, `hf:`.*`broken:`, `warehouse:`"):
        resolve("other:x")
    assert resolve(f"file:{checkpoints.write_source(tmp_path / 'model')}").folder == tmp_path / "model"


@pytest.mark.parametrize(
    ("files", "revision", "reason"),
    [
        ((SourceFile("a.json", 1),) * 2, None, "lists a.json more than once"),
        (tuple(SourceFile(f"{n}.json", 1) for n in range(100_001)), None, "more than 100000 files"),
        ((SourceFile("a.json", 1 << 51),), None, "or 1024 TiB"),
        ((), "../../etc", "has no valid revision"),
    ],
    ids=["twice", "too many", "too large", "a revision that leads elsewhere"],
)
def test_a_list_that_no_model_has_is_refused(
    files: tuple[SourceFile, ...], revision: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.HubModel, "find", lambda _: Found(revision or "1" * 40, files))
    with pytest.raises(SourceError, match=reason):
        resolve("hf://org/tiny")


def test_a_pull_loads_no_client_of_another_scheme() -> None:
    heavy = {"scipy", "numpy", "mlflow", "boto3", "huggingface_hub", "fsspec"}
    program = f"import sys, pipeline.sources.source; sys.exit(', '.join({heavy!r} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
