import pytest

from gae import locks
from gae.errors import GaeError
from gae.locks import alone


def test_a_folder_is_kept_by_one_process_at_a_time(tmp_path):
    with alone(tmp_path / "new"), pytest.raises(GaeError, match="new: another run is writing here"), alone(tmp_path / "new"):
        pass
    with alone(tmp_path / "new"):
        pass


def test_a_folder_that_its_last_user_removed_is_made_again_and_locked(tmp_path, monkeypatch):
    folder, lock, removed = tmp_path / "staging", locks._lock, []

    def remove_first(handle, path):
        if not removed:
            removed.append(folder.rmdir())
        lock(handle, path)

    monkeypatch.setattr(locks, "_lock", remove_first)
    with alone(folder):
        assert folder.is_dir()
        with pytest.raises(GaeError, match="another run is writing here"), alone(folder):
            pass
