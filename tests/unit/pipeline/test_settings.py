"""The environment, read once."""

from __future__ import annotations

import sys
import zoneinfo
from pathlib import Path

import pytest

from checkout import CHECKOUT
from pipeline.errors import SettingsError
from pipeline.settings import Settings


def test_everything_has_a_default_in_the_checkout() -> None:
    settings = Settings.read({})
    assert settings.home == CHECKOUT / ".slipway"
    assert settings.models == CHECKOUT / "models"
    assert settings.tracking_uri == f"sqlite:///{settings.home}/mlflow/mlflow.db"
    assert settings.signing_key == settings.home / "keys" / "release.pem"
    assert settings.trusted_keys == (settings.home / "keys" / "release.pub",)
    assert settings.docker_host is None


def test_the_environment_decides(tmp_path: Path) -> None:
    settings = Settings.read(
        {
            "SLIPWAY_HOME": str(tmp_path / "h"),
            "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
            "DOCKER_HOST": "unix:///x.sock",
            "SLIPWAY_SIGNING_KEY": str(tmp_path / "k.pem"),
            "SLIPWAY_TRUSTED_KEYS": "/a.pub:/b.pub",
        }
    )
    assert settings.home == tmp_path / "h"
    assert settings.tracking_uri == "http://127.0.0.1:5000"
    assert settings.docker_host == "unix:///x.sock"
    assert settings.trusted_keys == (Path("/a.pub"), Path("/b.pub"))


def test_children_inherit_an_allowlist() -> None:
    environment = {"PATH": "/bin", "HF_TOKEN": "secret", "AWS_SECRET_ACCESS_KEY": "secret", "UV_FIND_LINKS": "/wheels"}
    settings = Settings.read(environment)
    assert settings.child_environment == {"PATH": "/bin"}
    assert settings.installer_environment == {"PATH": "/bin", "UV_FIND_LINKS": "/wheels"}


@pytest.mark.parametrize("name", ["SLIPWAY_HOME", "SLIPWAY_MODELS"])
def test_a_place_that_is_no_folder_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=f"`{name}`.*file.*not a folder"):
        Settings.read({name: str(tmp_path / "file")})
    with pytest.raises(SettingsError, match=f"`{name}` is empty"):
        Settings.read({name: ""})


@pytest.mark.parametrize(
    ("name", "setting"), [("SLIPWAY_COLD_STORE", "cold_store"), ("SLIPWAY_ARTIFACTS", "artifacts")]
)
def test_an_object_store_is_named_by_the_environment_or_there_is_none(tmp_path: Path, name: str, setting: str) -> None:
    home = {"SLIPWAY_HOME": str(tmp_path)}
    assert getattr(Settings.read(home), setting) is None
    assert getattr(Settings.read({**home, name: "s3://bucket/prefix"}), setting) == "s3://bucket/prefix"


def test_how_much_disk_stays_free_is_a_size() -> None:
    assert Settings.read({}).disk_floor == 2 * 2**30
    assert Settings.read({"SLIPWAY_DISK_FLOOR": "10GiB"}).disk_floor == 10 * 2**30
    with pytest.raises(SettingsError, match=r"`SLIPWAY_DISK_FLOOR` is 'much': expected a size such as 2GiB"):
        Settings.read({"SLIPWAY_DISK_FLOOR": "much"})


def test_schedules_keep_a_zones_hours() -> None:
    assert Settings.read({}).timezone == "UTC"
    assert Settings.read({"SLIPWAY_TIMEZONE": "Europe/Berlin"}).timezone == "Europe/Berlin"
    with pytest.raises(
        SettingsError,
        match=r"`SLIPWAY_TIMEZONE` is 'Berlin': expected a time zone of this system",
    ):
        Settings.read({"SLIPWAY_TIMEZONE": "Berlin"})


def test_a_small_image_needs_no_table_of_zones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.partition(".")[0] == "tzdata"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tzdata", None)
    zoneinfo.reset_tzpath(())
    zoneinfo.ZoneInfo.clear_cache()
    try:
        assert Settings.read({}).timezone == "UTC"
        with pytest.raises(SettingsError, match=r"`SLIPWAY_TIMEZONE` is 'Europe/Berlin': .*`tzdata`"):
            Settings.read({"SLIPWAY_TIMEZONE": "Europe/Berlin"})
    finally:
        zoneinfo.reset_tzpath()


def test_nobody_is_told_unless_the_environment_names_somebody_and_secrets_are_not_shown() -> None:
    assert not Settings.read({}).notifies
    named = {"SLIPWAY_NOTIFY_MAIL": "a@example.org, b@example.org", "SLIPWAY_NOTIFY_SMTP": "smtps://u:pw-x1@mail:465"}
    settings = Settings.read({**named, "SLIPWAY_NOTIFY_WEBHOOK": "https://hooks/T0-x1", "HF_TOKEN": "hf-x1"})
    assert settings.notifies
    assert settings.mail_to == ("a@example.org", "b@example.org")
    assert "x1" not in repr(settings)
    with pytest.raises(SettingsError, match="needs `SLIPWAY_NOTIFY_SMTP`"):
        Settings.read({"SLIPWAY_NOTIFY_MAIL": "a@example.org"})


def test_an_address_of_a_database_that_is_none_is_refused_without_its_password() -> None:
    with pytest.raises(SettingsError, match="`SLIPWAY_DAGSTER_POSTGRES`") as raised:
        Settings.read({"SLIPWAY_DAGSTER_POSTGRES": "mysql://slipway:secret@127.0.0.1/dagster"})
    assert "secret" not in str(raised.value)


def test_mlflow_is_found_beside_the_ui_or_where_its_server_is_and_never_with_a_password() -> None:
    assert Settings.read({}).mlflow_address == "http://127.0.0.1:3001"
    assert Settings.read({"SLIPWAY_UI_ADDRESS": "http://host:8000"}).mlflow_address == "http://host:8001"
    remote = Settings.read({"MLFLOW_TRACKING_URI": "https://me:secret@mlflow.example/"})
    assert remote.mlflow_address == "https://mlflow.example"


def test_a_cpu_is_limited_to_avx2_or_not_at_all() -> None:
    assert Settings.read({"SLIPWAY_CPU_ISA": "avx2"}).cpu.instruction_set in {"none", "avx2"}
    assert Settings.read({"SLIPWAY_CPU_ISA": ""}).cpu_limit is None
    with pytest.raises(SettingsError, match=r"`SLIPWAY_CPU_ISA` is 'sse2': expected `avx2`"):
        Settings.read({"SLIPWAY_CPU_ISA": "sse2"})


def test_a_token_that_no_header_carries_is_refused_by_its_name_alone() -> None:
    assert Settings.read({"HF_TOKEN": " hf_abc\n"}).hub_token == "hf_abc"  # noqa: S105 - none
    assert Settings.read({"HF_TOKEN": "\n"}).hub_token is None
    with pytest.raises(SettingsError, match="`HF_TOKEN` holds a character that no token has") as caught:
        Settings.read({"HF_TOKEN": "hf_abc\nhf_def"})
    assert "hf_" not in str(caught.value)
