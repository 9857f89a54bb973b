from pathlib import Path

import pytest

from lowvram_db.plan import make_plan, remember


@pytest.mark.parametrize("home", ["unknown", "a file"])
def test_a_plan_is_made_where_none_can_be_kept(make_config, tmp_path, monkeypatch, home):
    """No home, as for a container's user without a name; or one that cannot be written."""

    def unknown():
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "a file").touch()
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown if home == "unknown" else lambda: tmp_path / home)
    made = []
    monkeypatch.setattr("lowvram_db.plan.choose.choose", lambda *_: made.append(1) or "a plan")
    assert make_plan(make_config(), None) == "a plan"
    assert made


def test_a_plan_is_remembered_for_the_computer_it_was_made_on(make_config, miniature, monkeypatch):
    """They may share a home, and not the arithmetic."""
    keys = set()
    for name in ("one", "other", "one"):
        monkeypatch.setattr("platform.node", lambda name=name: name)
        keys.add(remember.key(make_config(), miniature, None, False))
    assert len(keys) == 2


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"phases": [1]}', '{"phases": {}}', "\0" * 99])
def test_what_is_no_plan_is_not_taken_for_one(tmp_path, monkeypatch, content):
    monkeypatch.setattr(remember, "folder", lambda: tmp_path)
    (tmp_path / "key.json").write_text(content)
    assert remember.recall("key") is None
