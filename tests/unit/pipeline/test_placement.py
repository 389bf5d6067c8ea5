"""Where workers run, as a file says it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.errors import SettingsError
from pipeline.settings import Settings
from pipeline.workers.launchers.configured import have_gpus, launcher
from pipeline.workers.launchers.jobs import Jobs
from pipeline.workers.launchers.local import Local
from pipeline.workers.launchers.placement import placement

RAY = "launcher: ray\naddress: http://127.0.0.1:8265\nstore: s3://artifacts/slipway\n"
KUBERNETES = f"launcher: kubernetes\nimage: registry.example/worker@sha256:{'a' * 64}\nstore: s3://artifacts/slipway\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "workers.yaml"
    path.write_text(text)
    return path


def test_workers_run_here_unless_a_file_says_where(tmp_path: Path) -> None:
    assert isinstance(launcher(Settings.read({}), print), Local)
    settings = Settings.read({"SLIPWAY_WORKERS": str(written(tmp_path, RAY))})
    found = launcher(settings, print)
    assert isinstance(found, Jobs)
    assert found.engine.name == "the Ray cluster at http://127.0.0.1:8265"


def test_a_worker_has_the_gpus_that_it_asks_a_cluster_for(tmp_path: Path) -> None:
    settings = Settings.read({"SLIPWAY_WORKERS": str(written(tmp_path, RAY))})
    assert not have_gpus(settings)
    written(tmp_path, RAY + "gpus: 2\nresources: {h200: 1}\n")
    assert have_gpus(settings)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (RAY + "gpu: 1\n", "unknown key `gpu`: did you mean `gpus`?"),
        (RAY.replace("ray", "rai"), "`launcher`: "),
        (RAY.replace("s3:", "file:"), "`store`: "),
        (RAY.replace("address: http://127.0.0.1:8265\n", ""), "`address` is missing"),
        (RAY + "gpus: -1\n", "`gpus`: "),
        ("", "is not a mapping"),
        (KUBERNETES + "memory: much\n", "`memory`: "),
        (KUBERNETES.replace("@sha256", ":latest@sha1"), "`image`: "),
        (KUBERNETES + "tolerations: [{key: nvidia.com/gpu, efect: NoSchedule}]\n", "did you mean `effect`?"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(SettingsError, match=f"(?s)SLIPWAY_WORKERS.*{re.escape(told)}"):
        placement(written(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"(?s)SLIPWAY_WORKERS.*none\.yaml"):
        placement(tmp_path / "none.yaml")


def test_a_cluster_of_kubernetes_is_where_its_pods_find_it_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    found = launcher(Settings.read({"SLIPWAY_WORKERS": str(written(tmp_path, KUBERNETES))}), print)
    assert isinstance(found, Jobs)
    assert found.engine.name == "Kubernetes at https://kubernetes.default.svc, namespace default"
