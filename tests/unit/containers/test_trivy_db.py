"""Looking into Trivy's database: what it holds, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from containers.scan.trivy_db import DatabaseDamagedError, filled_buckets, read_database
from stages.trivy_db.make_trivy_db import write_database


def advisories(count: int = 1, target: str = "debian 12") -> list[dict[str, Any]]:
    return [
        {
            "id": f"CVE-2099-{number:05}",
            "target": target,
            "package": f"package-{number}",
            "severity": "LOW",
            "fixed": "1",
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [1, 60, 5000])
def test_buckets_are_found_whatever_the_depth_of_the_tree(tmp_path: Path, count: int) -> None:
    write_database(tmp_path, advisories(count) + advisories(1, "pip"))
    database = read_database(tmp_path)
    assert database.buckets == ("data-source", "debian 12", "pip::GitHub Security Advisory pip", "vulnerability")
    assert database.is_usable
    assert database.state_for("debian", "12.8", ["python-pkg"]) == ("ok", [])


def test_many_distributions_spread_over_many_pages(tmp_path: Path) -> None:
    names = [f"debian {number}" for number in range(1, 400)]
    write_database(tmp_path, [item for name in names for item in advisories(1, name)])
    assert set(names) < set(read_database(tmp_path).buckets)


def test_a_database_without_advisories_is_empty(tmp_path: Path) -> None:
    write_database(tmp_path, [])
    database = read_database(tmp_path)
    assert database.is_usable
    assert database.state_for("debian", "12", []) == ("empty", [])


@pytest.mark.parametrize(
    ("family", "release", "kinds", "lacking"),
    [
        ("debian", "11.4", [], ["debian 11"]),
        ("ubuntu", "22.04", [], ["ubuntu 22.04"]),
        ("alpine", "3.20.1", [], ["alpine 3.20"]),
        ("wolfi", "2023", [], ["wolfi"]),
        ("debian", "12", ["python-pkg", "jar"], ["maven", "pip"]),
        (None, None, ["gobinary"], ["go"]),
        (None, None, [], ["an image without recognized distribution or packages"]),
    ],
)
def test_what_it_lacks_for_an_image_is_named(
    tmp_path: Path, family: str | None, release: str | None, kinds: list[str], lacking: list[str]
) -> None:
    write_database(tmp_path, advisories())
    assert read_database(tmp_path).state_for(family, release, kinds)[1] == lacking


def test_none_is_absent(tmp_path: Path) -> None:
    database = read_database(tmp_path)
    assert (database.is_usable, database.state_for("debian", "12", [])) == (False, ("absent", []))


@pytest.mark.parametrize("keep", [0, 100, 4096, 5000, -4096])
def test_a_cut_off_file_is_damaged(tmp_path: Path, keep: int) -> None:
    path = write_database(tmp_path, advisories(300))
    path.write_bytes(path.read_bytes()[:keep])
    database = read_database(tmp_path)
    assert database.state_for("debian", "12", [])[0] == "damaged"
    assert not database.is_usable
    with pytest.raises(DatabaseDamagedError):
        list(filled_buckets(path))


def test_one_bad_meta_page_is_survived_and_two_are_not(tmp_path: Path) -> None:
    path = write_database(tmp_path, advisories())
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    assert read_database(tmp_path).is_usable
    data[4096 + 20] ^= 1
    path.write_bytes(data)
    assert "no valid meta page" in str(read_database(tmp_path).damage)


@pytest.mark.parametrize(
    "change",
    [None, {"Version": 1}, {"UpdatedAt": "yesterday"}, {"UpdatedAt": "2026-11-23T00:00:00"}, {"NextUpdate": None}],
)
def test_metadata_that_says_nothing_is_damage(tmp_path: Path, change: dict[str, Any] | None) -> None:
    metadata = write_database(tmp_path, advisories()).with_name("metadata.json")
    if change is None:
        metadata.unlink()
    else:
        metadata.write_text(json.dumps({**json.loads(metadata.read_text()), **change}))
    assert "metadata.json" in str(read_database(tmp_path).damage)


def test_trivys_own_time_stamps_are_read(tmp_path: Path) -> None:
    metadata = write_database(tmp_path, advisories()).with_name("metadata.json")
    stamps = {"UpdatedAt": "2026-11-23T06:18:26.123456789Z", "NextUpdate": "2026-11-24T06:18:26.123456789Z"}
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), **stamps}))
    assert read_database(tmp_path).is_usable
