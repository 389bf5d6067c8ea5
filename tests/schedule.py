"""In what order the tests run, and which of them share one worker: the data behind ``pytest -n 2 --dist loadscope``.

A group runs on one worker, test after test. A file that no group names is a group of its own. `tests/README.md` says
what each costs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

_TESTS = Path(__file__).parent
# From the longest to the shortest, so that both workers end at about the same time. What is in one group uses the same
# thing, and two at once would disturb each other or make it twice: two Ray clusters take ports from each other.
GROUPS: dict[str, tuple[str, ...]] = {
    "release": ("end_to_end/test_release.py", "end_to_end/test_tensor_parallel.py"),
    "checkpoints": ("stages/test_quantize.py", "stages/test_drift.py", "stages/test_published.py"),
    "ui": ("end_to_end/test_survival.py", "end_to_end/test_ui.py", "end_to_end/test_automation.py"),
    "elsewhere": ("end_to_end/test_elsewhere.py", "stages/test_ray.py"),
    "instruction-sets": (
        "end_to_end/test_instruction_sets.py",
        "end_to_end/test_adapters.py",
        "end_to_end/test_formats.py",
    ),
    "vllm": ("stages/test_served.py", "stages/test_monitoring.py", "stages/test_planner.py"),
    "kernels": ("stages/test_kernels.py",),
    "images": ("stages/test_image.py", "stages/test_reproducible.py", "stages/test_retention.py"),
}
_GROUP_OF = {file: group for group, files in GROUPS.items() for file in files}
_RANK = {group: rank for rank, group in enumerate(GROUPS)}


class ByGroup(LoadScopeScheduling):  # type: ignore[misc]  # it has no types; xdist's own groups do not work with pytest 9
    """Gives each group to one worker, in the order in which the tests were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid.partition("::")[0].removeprefix(f"{_TESTS.name}/"))


def place(item: pytest.Item) -> tuple[bool, int, str]:
    """Sort the unit tests first, since what fails in seconds comes first; then the groups, the longest first."""
    file = item.path.relative_to(_TESTS).as_posix()
    group = _group(file)
    return not file.startswith("unit/"), _RANK.get(group, len(_RANK)), group


def _group(file: str) -> str:
    return _GROUP_OF.get(file, file)
