from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.folder_name import from_any, problem


@given(
    st.text(st.characters(codec=None)) | st.text('.: /\\ conNUL1\udcff犬"', max_size=12) | st.text("犬", min_size=60)
)
def test_any_name_becomes_one_that_can_be_a_folders_and_stays_where_it_can(name):
    assert problem(from_any(name)) is None
    if problem(name) is None:
        assert from_any(name) == name


@given(name=st.text(st.characters(codec="utf-8"), max_size=60))
def test_what_can_be_a_folders_name_is_one(tmp_path, name):
    if problem(name) is None:
        (tmp_path / name).mkdir(exist_ok=True)
        assert name in [folder.name for folder in tmp_path.iterdir()]
