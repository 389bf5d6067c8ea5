"""Which image of the gateway a bundle may name without being told."""

from __future__ import annotations

from pathlib import Path

import pytest

from containers.image.gateway_image import gateway_program
from containers.image.program_image import ProgramImage
from pipeline.resources import REQUIREMENTS
from pipeline.serving.gateway_process import pushed_image

DIGEST = "sha256:" + "ab" * 32
BUILT = ProgramImage(
    reference=f"registry.example/gateway@{DIGEST}", pushed=True, digest=DIGEST, image_id=DIGEST,
    contents=gateway_program(REQUIREMENTS).contents, size_bytes=1,
)  # fmt: skip


def remembered(home: Path, text: str) -> Path:
    (home / "gateway").mkdir()
    (home / "gateway" / "image.json").write_text(text)
    return home


def test_the_image_that_was_pushed_of_this_gateway_is_known(tmp_path: Path) -> None:
    assert pushed_image(remembered(tmp_path, BUILT.model_dump_json())) == BUILT.reference


@pytest.mark.parametrize("changes", [{"pushed": False, "reference": DIGEST}, {"contents": DIGEST}])
def test_one_that_no_cluster_can_pull_or_of_another_gateway_is_not(tmp_path: Path, changes: dict[str, object]) -> None:
    assert pushed_image(tmp_path) is None
    assert pushed_image(remembered(tmp_path, BUILT.model_copy(update=changes).model_dump_json())) is None


def test_what_another_version_remembered_is_not(tmp_path: Path) -> None:
    assert pushed_image(remembered(tmp_path, '{"reference": "registry.example/gateway"}')) is None
