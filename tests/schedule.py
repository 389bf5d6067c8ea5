"""In what order the tests run, and which of them share one worker: the data behind ``pytest -n 2 --dist loadgroup``.

A group runs on one worker, test after test. A file that no group names is a group of its own. `tests/README.md` says
what each costs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

_TESTS = Path(__file__).parent
# From the longest to the shortest, so that both workers end at about the same time. What is in one group uses the same
# thing, and two at once would disturb each other or make it twice.
GROUPS: dict[str, tuple[str, ...]] = {
    "release": ("end_to_end/test_release.py",),
    "checkpoints": ("stages/test_quantize.py", "stages/test_drift.py"),
    "ui": ("end_to_end/test_survival.py", "end_to_end/test_ui.py", "end_to_end/test_automation.py"),
    "elsewhere": ("end_to_end/test_elsewhere.py",),
    "instruction-sets": ("end_to_end/test_instruction_sets.py",),
    "vllm": ("stages/test_served.py", "stages/test_monitoring.py", "stages/test_planner.py"),
    "kernels": ("stages/test_kernels.py",),
    "images": ("stages/test_image.py", "stages/test_reproducible.py", "stages/test_retention.py"),
}
_GROUP_OF = {file: group for group, files in GROUPS.items() for file in files}
_RANK = {group: rank for rank, group in enumerate(GROUPS)}


def arrange(items: list[pytest.Item]) -> None:
    """Put every test into its group, and the groups in order: unit tests, then the longest ones first."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=_place)


def _file(item: pytest.Item) -> str:
    return item.path.relative_to(_TESTS).as_posix()


def _group(item: pytest.Item) -> str:
    file = _file(item)
    return _GROUP_OF.get(file, file.removesuffix(".py").replace("/", "."))


def _place(item: pytest.Item) -> tuple[bool, int]:
    """What fails in seconds comes first."""
    return not _file(item).startswith("unit/"), _RANK.get(_group(item), len(_RANK))
