import pytest

from gae.errors import GaeError
from gae.locks import alone


def test_a_folder_is_kept_by_one_process_at_a_time(tmp_path):
    with alone(tmp_path / "new"), pytest.raises(GaeError, match="new: another run is writing here"), alone(tmp_path / "new"):
        pass
    with alone(tmp_path / "new"):
        pass
