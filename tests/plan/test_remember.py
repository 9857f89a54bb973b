from pathlib import Path

import pytest

from lowvram_db.families import open_blank
from lowvram_db.plan import make_plan, remember
from lowvram_db.plan.choose import choose


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


# What a plan has been seen to follow from, or is taken to; whatever is new has to be put on one of both sides.
@pytest.mark.parametrize(
    ("sections", "is_another"),
    [
        ({"train": {"lr": 3e-4, "schedule": "cosine", "warmup": 1, "seed": 8, "flip": True, "variants": 3}}, False),
        ({"prior": {"count": 7, "weight": 0.5, "prompt": "a {class}", "steps": 9, "seed": 3}}, False),
        (
            {"sample": {"prompts": ["a {class}"], "steps": 5}, "optimizer": {"eps": 1e-6}, "output": {"name": "x"}},
            False,
        ),
        ({"sample": {"every": 3}}, True),
        ({"sample": {"seeds": 3}}, True),
        ({"prior": {"batch": 4}}, True),  # its default, but fixed now
        ({"prior": {"enabled": False}}, True),
        ({"train": {"ema": 0.99}}, True),
        ({"train": {"resolution": 128}}, True),
        ({"optimizer": {"name": "adamw"}}, True),
    ],
)
def test_a_plan_is_known_by_what_it_follows_from(make_config, miniature, sections, is_another):
    """Where the key is the same, so is the plan."""
    plain, changed = make_config(), make_config(**sections)
    keys = {remember.key(config, miniature, None, False) for config in (plain, changed)}
    assert len(keys) == 1 + is_another
    if not is_another:
        blank = open_blank(miniature)
        assert choose(plain, blank, None).to_json() == choose(changed, blank, None).to_json()


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"phases": [1]}', '{"phases": {}}', "\0" * 99])
def test_what_is_no_plan_is_not_taken_for_one(tmp_path, monkeypatch, content):
    monkeypatch.setattr(remember, "folder", lambda: tmp_path)
    (tmp_path / "key.json").write_text(content)
    assert remember.recall("key") is None
