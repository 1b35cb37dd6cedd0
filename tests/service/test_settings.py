"""Where settings come from: options over environment over files of secrets."""

from pathlib import Path

import pytest

from flashbulb_service.errors import InvalidRequest
from flashbulb_service.settings import read_settings


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that the settings read, with the queue's address in it."""
    (tmp_path / "flashbulb_redis").write_text("redis://:from-file@queue:6379/0\n", encoding="utf-8")
    monkeypatch.setenv("FLASHBULB_SECRETS_DIR", str(tmp_path))
    return tmp_path


def test_a_file_of_the_secrets_folder_is_a_setting(secrets: Path) -> None:
    assert read_settings().redis == "redis://:from-file@queue:6379/0"


def test_environment_wins_over_file_and_option_over_both(
    secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHBULB_REDIS", "redis://environment")
    assert read_settings().redis == "redis://environment"
    assert read_settings(redis="redis://option").redis == "redis://option"


def test_a_bad_value_in_a_file_is_refused_without_quoting_it(secrets: Path) -> None:
    (secrets / "flashbulb_redis").write_text("hunter2", encoding="utf-8")
    with pytest.raises(InvalidRequest, match="expected redis://") as caught:
        read_settings()
    assert "hunter2" not in str(caught.value)


def test_a_missing_folder_of_secrets_is_no_silent_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHBULB_SECRETS_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(InvalidRequest, match="expected a folder in FLASHBULB_SECRETS_DIR"):
        read_settings()
