import pytest

from lowvram_db.errors import UserError
from lowvram_db.files.foreign import read_json


def test_json_that_is_missing_or_broken_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: missing; a model has one"):
        read_json(tmp_path / "config.json", "a model has one")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        read_json(tmp_path / "config.json", "")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        read_json(tmp_path / "config.json", "")
