"""What is a cluster's own, as a person writes it for `slipway bundle`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from containers.kubernetes.cluster import Cluster
from pipeline.cli import main
from pipeline.errors import SpecError
from pipeline.serving.deployment import cluster


def written(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def test_what_is_not_said_is_the_default(tmp_path: Path) -> None:
    found = cluster(written(tmp_path, "ephemeral_storage: 8Gi\ndns_addresses: [169.254.20.10]\n"))
    assert found == Cluster.model_validate({"ephemeral_storage": "8192Mi", "dns_addresses": ["169.254.20.10"]})
    assert found.dns_blocks == ("169.254.20.10/32",)
    assert found.surge


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("runtimeclass: nvidia\n", "unknown key `runtimeclass`: did you mean `runtime_class`?"),
        ("runtime_class: Nvidia GPU\n", "`runtime_class`: "),
        ("image_pull_secrets: registry\n", "`image_pull_secrets`: "),
        ("priority_class: 'a: b'\n", "`priority_class`: "),
        ("cpu_request: 0\n", "`cpu_request`: "),
        ("ephemeral_storage: 8G\n", "`ephemeral_storage`: expected an amount like 512Mi or 8Gi (found '8G')"),
        ("monitor_labels: {release: 'a b'}\n", "`monitor_labels.release`: "),
        ("monitor_labels: {'a b': x}\n", "`monitor_labels.a b.[key]`: "),
        ("redis_image: valkey/valkey:8\n", "`redis_image`: "),
        ("dns: coredns\n", "`dns`: "),
        ("dns_addresses: [169.254.20.10/32]\n", "`dns_addresses.0`: "),
    ],
)
def test_what_is_wrong_is_named_with_its_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(
        SpecError, match=f"(?s)cluster.yaml is not a valid description of a cluster:.*{re.escape(told)}"
    ):
        cluster(written(tmp_path, text))


def test_the_command_reads_it_before_it_asks_the_registry(tmp_path: Path) -> None:
    described = str(written(tmp_path, "surge: often\n"))
    done = CliRunner().invoke(main, ["bundle", "demo-awq", "--out", str(tmp_path / "b"), "--cluster", described])
    assert "`surge`: " in str(done.exception) + done.output
    assert not (tmp_path / "b").exists()
