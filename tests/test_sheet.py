import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lowvram_db.errors import UserError
from lowvram_db.sheet import Drawn, Grid, draw_grid, read_grid, save_sheet


def colour(number):
    return Image.new("RGB", (64, 64), (40 * number, 0, 255 - 40 * number))


def test_the_grid_has_prompts_down_and_settings_across():
    rows = [[colour(0), colour(1), colour(2)], [colour(3), colour(4), colour(5)]]
    sheet = np.asarray(draw_grid(rows, ["one", "two"], ["a", "b", "c"]))
    places = {}
    for number in range(6):
        found = np.argwhere((sheet == (40 * number, 0, 255 - 40 * number)).all(-1))
        assert len(found) == 64 * 64, "a picture is covered or cut"
        places[number] = found.min(0)
    for number in (0, 1):
        assert places[number][0] == places[number + 1][0]
        assert places[number + 1][1] >= places[number][1] + 64
    assert places[3][0] >= places[0][0] + 64


def test_every_row_and_column_is_labelled():
    sheet = np.asarray(
        draw_grid([[colour(0), colour(1)]] * 2, ["a long prompt that has to be wrapped", "b"], ["c", "d"])
    )
    left = sheet[:, :100]
    rows_with_ink = (left < 128).any((1, 2))
    assert rows_with_ink.any()
    top = sheet[:16]
    assert (top[:, -68:] < 128).any()
    assert (top[:, -136:-68] < 128).any()


@pytest.mark.parametrize("side", [64, 512])
def test_a_long_prompt_is_not_cut(side):
    """The row grows with its label: ink of the last word is on the sheet."""
    picture = Image.new("RGB", (side, side))
    short = draw_grid([[picture]], ["word"], ["c"])
    long = draw_grid([[picture]], ["word " * 60], ["c"])
    assert long.height > short.height or side == 512
    assert long.width == short.width


def grid_of(prompts, guidance, seeds, shade=0, size=(16, 24)):
    columns = len(guidance) * seeds
    rows = [
        [Image.new("RGB", size, (10 * row, 10 * column, shade)) for column in range(columns)]
        for row in range(len(prompts))
    ]
    return Grid(prompts, guidance, seeds, 30, rows)


SCALES = st.lists(st.sampled_from([1.0, 2.5, 7.0, 11.0]), min_size=1, max_size=3, unique=True)


@settings(max_examples=30)
@given(
    st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=60), min_size=1, max_size=4, unique=True),
    SCALES,
    st.integers(1, 3),
    st.booleans(),
)
def test_pictures_are_taken_out_as_they_were_put_in(tmp_path_factory, prompts, guidance, seeds, has_base):
    path = tmp_path_factory.mktemp("sheet") / "sheet.png"
    grid, base = grid_of(prompts, guidance, seeds, shade=200), grid_of(prompts, guidance, seeds, shade=90)
    save_sheet(path, {"base model": base, "step 4": grid} if has_base else {"step 4": grid})
    read = read_grid(path)
    assert read.compares_with(grid) and list(read.pictures) == list(grid.pictures)
    for drawn, picture in grid.pictures.items():
        assert read.pictures[drawn].tobytes() == picture.tobytes()
    first = Drawn(prompts[0], guidance[0], 0)
    assert next(iter(read.pictures)) == first


def test_the_base_models_pictures_are_right_above_those_of_the_step(tmp_path):
    base, grid = (grid_of(["one", "two"], [7.0], 2, shade) for shade in (90, 200))
    save_sheet(tmp_path / "sheet.png", {"base model": base, "step 4": grid})
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    tops = {
        (row, shade): np.argwhere((sheet == (10 * row, 10, shade)).all(-1)).min(0)
        for row in (0, 1)
        for shade in (90, 200)
    }
    assert sorted(tops, key=lambda which: tops[which][0]) == [(0, 90), (0, 200), (1, 90), (1, 200)]
    assert len({top[1] for top in tops.values()}) == 1


@pytest.mark.parametrize(
    "other",
    [
        grid_of(["a"], [7.0], 2),
        grid_of(["b"], [7.0], 1),
        grid_of(["a"], [8.0], 1),
        grid_of(["a"], [7.0], 1, size=(24, 24)),
    ],
)
def test_grids_of_other_prompts_scales_seeds_or_sizes_do_not_compare(other):
    assert not grid_of(["a"], [7.0], 1).compares_with(other)


@pytest.mark.parametrize(
    "told",
    ["", "[]", "{}", '{"prompts": 3}', "9" * 5000, "[" * 5000]
    + [
        json.dumps({"prompts": ["a"], "guidance": [7], "seeds": 1, "steps": 2, "size": [8, 8]} | change)
        for change in (
            {"places": [[[57, 0]]]},
            {"places": [[[-1, 0]]]},
            {"places": [[[0, 0], [8, 0]]]},
            {"places": [[[0, 0]]], "size": [0, 8]},
            {"places": [[[0, 0]]], "size": [8, 1e9]},
            {"places": [], "prompts": []},
            {"places": [[[0, 0]]], "seeds": 10**9},
        )
    ],
)
def test_a_sheet_that_tells_nonsense_is_refused(tmp_path, told):
    text = PngInfo()
    text.add_text("lowvram-db", told)
    Image.new("RGB", (64, 64)).save(tmp_path / "sheet.png", pnginfo=text)
    with pytest.raises(UserError, match=r"sheet\.png: no sheet"):
        read_grid(tmp_path / "sheet.png")


def test_older_sheets_tell_nothing_and_cut_ones_are_refused(tmp_path):
    path = tmp_path / "sheet.png"
    draw_grid([[colour(1)]], ["one"], ["a"]).save(path)
    assert read_grid(path) is None
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"sheet\.png: no sheet"):
        read_grid(path)
    with pytest.raises(UserError, match="nowhere"):
        read_grid(tmp_path / "nowhere.png")
