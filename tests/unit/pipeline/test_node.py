"""What a node that does errands keeps on its disk: its own folder, and nothing of the dead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline.launchers.node import own_folder
from pipeline.settings import CHECKOUT

# An errand in its middle, with a checkpoint's weights.
BUSY = """
import sys
from pathlib import Path
from pipeline.launchers.node import own_folder

with own_folder(Path(sys.argv[1])) as folder:
    (folder / "model.safetensors").write_bytes(b"weights")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_errand_left_is_removed_by_the_next_and_one_that_goes_on_is_spared(tmp_path: Path) -> None:
    busy = [
        subprocess.Popen(
            [sys.executable, "-c", BUSY, str(tmp_path / "scratch")],
            cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    folders = []
    for process in busy:
        assert process.stdout is not None
        folders.append(Path(process.stdout.readline().strip()))
    busy[0].kill()
    busy[0].communicate()
    with own_folder(tmp_path / "scratch") as folder:
        assert not list(folder.iterdir())
        assert not folders[0].exists()
        assert (folders[1] / "model.safetensors").read_bytes() == b"weights"
    busy[1].communicate()
    assert list((tmp_path / "scratch").iterdir()) == []
