"""Servers of one machine get cores of their own, whichever home starts them, and share only when they must."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkout import CHECKOUT
from containers.hardware.core_pool import CoreRequest, Cores, neighbours_together, reserved

HOLD = """
import sys
from pathlib import Path
from containers.hardware.core_pool import CoreRequest, reserved
with reserved(CoreRequest(Path(sys.argv[1]), int(sys.argv[2])), print, range(4)) as cores:
    print(cores.cpuset, flush=True)
    sys.stdin.read()
"""


def test_parallel_servers_get_disjoint_cores(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        given = [stack.enter_context(reserved(CoreRequest(tmp_path, 2), print, range(6))) for _ in range(3)]
    assert [(cores.cpuset, cores.shared) for cores in given] == [("0,1", False), ("2,3", False), ("4,5", False)]


def test_more_servers_than_cores_share_evenly_and_are_told(tmp_path: Path) -> None:
    told: list[str] = []
    with contextlib.ExitStack() as stack:
        given = [stack.enter_context(reserved(CoreRequest(tmp_path, 1), told.append, range(2))) for _ in range(4)]
    assert [cores.numbers for cores in given] == [(0,), (1,), (0,), (1,)]
    assert [cores.shared for cores in given] == [False, False, True, True]
    assert told == [f"warning: other servers use every core: sharing {core}" for core in (0, 1)]


def test_a_core_whose_first_server_has_ended_still_has_its_second(tmp_path: Path) -> None:
    told: list[str] = []
    with contextlib.ExitStack() as first, contextlib.ExitStack() as others:
        first.enter_context(reserved(CoreRequest(tmp_path, 2), print, range(2)))
        others.enter_context(reserved(CoreRequest(tmp_path, 1), print, range(2)))
        first.close()
        rest = others.enter_context(reserved(CoreRequest(tmp_path), told.append, range(2)))
        shared = others.enter_context(reserved(CoreRequest(tmp_path), told.append, range(2)))
    assert rest == Cores((1,))
    assert shared == Cores((0, 1), shared=True)
    assert told == [
        "this server gets 1 of 2 cores: other servers use the rest",
        "warning: other servers use every core: sharing 0, 1",
    ]


def test_who_wants_all_gets_what_is_free_and_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    with (
        reserved(CoreRequest(tmp_path, 1), print, range(4)),
        reserved(CoreRequest(tmp_path), told.append, range(4)) as rest,
    ):
        assert rest == Cores((1, 2, 3))
    assert told == ["this server gets 3 of 4 cores: other servers use the rest"]
    with reserved(CoreRequest(tmp_path), told.append, range(4)) as again:
        assert again == Cores((0, 1, 2, 3))


def test_the_cores_of_a_killed_process_are_free(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "3"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "0,1,2\n"
        with reserved(CoreRequest(tmp_path), print, range(4)) as cores:
            assert cores.numbers == (3,)
        process.kill()
    with reserved(CoreRequest(tmp_path), print, range(4)) as cores:
        assert cores.numbers == (0, 1, 2, 3)


@pytest.mark.parametrize(("available", "given"), [(1, 1), (2, 1), (3, 2), (64, 63)])
def test_a_load_generator_has_a_core_of_its_own_where_there_are_enough(available: int, given: int) -> None:
    assert CoreRequest(Path(), with_client=True).of(available) == given
    assert CoreRequest(Path(), 2, with_client=True).of(available) == min(2, given)


def test_no_core_is_given_that_this_process_may_not_use(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    allowed = {max(before)}
    os.sched_setaffinity(0, allowed)
    try:
        with reserved(CoreRequest(tmp_path), print) as cores:
            assert set(cores.numbers) == allowed
    finally:
        os.sched_setaffinity(0, before)


def test_the_threads_of_one_core_are_given_together(tmp_path: Path) -> None:
    """Linux numbers the second threads of all cores after the first ones."""
    for number in range(4):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text("0\n")
        (folder / "core_id").write_text(f"{number % 2}\n")
    assert neighbours_together({0, 1, 2, 3}, tmp_path) == [0, 2, 1, 3]


def test_each_rank_gets_cores_of_its_own(tmp_path: Path) -> None:
    with reserved(CoreRequest(tmp_path, 5, ranks=2), print, [0, 4, 1, 5, 2, 6]) as cores:
        assert (cores.cpuset, cores.binding) == ("0,1,4,5", "0,4|1,5")
    with reserved(CoreRequest(tmp_path), print, range(2)) as cores:
        assert cores.binding == "0,1"


def test_ranks_are_more_than_the_load_generators_core_and_share_only_what_they_must(tmp_path: Path) -> None:
    assert CoreRequest(tmp_path, with_client=True, ranks=2).of(2) == 2
    assert CoreRequest(tmp_path, with_client=True, ranks=2).of(4) == 2
    assert CoreRequest(tmp_path, 1, ranks=2).of(4) == 2
    told: list[str] = []
    with (
        reserved(CoreRequest(tmp_path, 1), print, range(2)),
        reserved(CoreRequest(tmp_path, 2, ranks=2), told.append, range(2)) as cores,
    ):
        assert (cores.binding, cores.shared) == ("1|0", True)
    assert told == ["warning: other servers use every core: sharing 0"]
    with reserved(CoreRequest(tmp_path, ranks=2), print, range(1)) as cores:
        assert cores.binding == "0|0"
