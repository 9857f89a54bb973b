import time

import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.errors import UserError
from lowvram_db.formats import source
from lowvram_db.formats.source import find_model


def test_a_local_folder_is_taken_as_it_is(tmp_path):
    assert find_model(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match=r"model\.revision: .* has no revisions"):
        find_model(str(tmp_path), "main")


@pytest.mark.parametrize(
    "name",
    ["./nowhere", "/no/such/folder", "single-word", "a/b/c", "~/nowhere-at-all", "models..old/x", "my--models/x"],
)
def test_a_name_that_is_neither_folder_nor_hub_id(name):
    with pytest.raises(UserError, match=r"model\.name: no folder or file .* is not a hub id"):
        find_model(name)


@given(st.text("aZ9-._/", max_size=12) | st.from_regex(r"[a9][a9._-]*/[a9][a9._-]{,120}(\.git)?", fullmatch=True))
def test_what_is_taken_for_a_hub_id_the_hubs_library_takes_too(name):
    if source._HUB_ID.fullmatch(name):
        validate_repo_id(name)


def test_a_single_file_has_no_revision(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"model\.revision: .* is a local file, which has no revisions"):
        find_model(str(tmp_path / "model.safetensors"), "main")


def test_a_hub_id_without_network_is_said_at_once(monkeypatch):
    """Not offline by decree: the name of the hub really does not resolve here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"model\.name: some/model-v9 is not on this machine .* cannot be reached"):
        find_model("some/model-v9")
    assert time.monotonic() - began < 60


def test_a_hub_id_in_offline_mode(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the hub cannot be reached"):
        find_model("runwayml/stable-diffusion-v1-5")
