import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from lowvram_db import folder_name
from lowvram_db.concept import class_images as room
from lowvram_db.concept import describe
from lowvram_db.concept.class_images import class_images, own_images, shared_folder
from lowvram_db.concept.generated import recipe_of
from lowvram_db.errors import UserError
from lowvram_db.families.conditioning import collated
from lowvram_db.families.sd import StableDiffusion
from lowvram_db.families.text import encoded

CPU = torch.device("cpu")


@pytest.fixture
def text(family):
    def text(prompts):
        return collated([told for _, told in encoded(family, prompts, CPU, torch.float32)])

    return text


@pytest.fixture
def make(make_config, family, text, tmp_path):
    def make(folder=tmp_path / "class", family=family, base="digest", train=None, **settings):
        config = make_config(prior={"count": 5, "steps": 2, "batch": 2} | settings, train=train or {})
        return class_images(config, family, folder, base, text, CPU)

    return make


def pixels(paths):
    return [np.asarray(Image.open(path)) for path in paths]


def test_missing_images_are_generated(make):
    images = make()
    assert [path.name for path in images] == [f"class-{number:05d}.png" for number in range(5)]
    contents = pixels(images)
    assert {content.shape for content in contents} == {(64, 64, 3)}
    assert len({content.tobytes() for content in contents}) == 5


def test_an_interrupted_generation_goes_on_with_the_same_pictures(make, tmp_path, family):
    class StopsAfterOneBatch:
        def __init__(self):
            self.batches = 0

        def __getattr__(self, name):
            return getattr(family, name)

        def sampler(self, denoiser):
            def pipeline(**inputs):
                self.batches += 1
                if self.batches == 2:
                    raise KeyboardInterrupt
                return family.sampler(denoiser)(**inputs)

            return pipeline

    straight = pixels(make(folder=tmp_path / "straight"))
    with pytest.raises(KeyboardInterrupt):
        make(folder=tmp_path / "stopped", family=StopsAfterOneBatch())
    kept = sorted((tmp_path / "stopped").glob("*.png"))
    assert len(kept) == 2
    times = [path.stat().st_mtime_ns for path in kept]
    resumed = make(folder=tmp_path / "stopped")
    assert [path.stat().st_mtime_ns for path in kept] == times, "what was there has been made again"
    for one, other in zip(pixels(resumed), straight, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1  # another batch size may round differently


def test_nothing_is_loaded_when_nothing_is_missing(make, family, monkeypatch):
    make()
    for load in ("load_denoiser", "load_text_encoders", "load_vae"):
        monkeypatch.setattr(family, load, lambda *_: pytest.fail("a network was loaded"))
    assert len(make()) == 5
    assert len(make(count=3)) == 3


def test_own_pictures_count_first_and_stay(make, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    for name in ("class-photo.jpg", "mine.jpg"):
        Image.new("RGB", (30, 30), "green").save(folder / name)
    before = (folder / "mine.jpg").read_bytes()
    images = make()
    generated = [f"class-{number:05d}.png" for number in range(3)]
    assert [path.name for path in images] == ["class-photo.jpg", "mine.jpg", *generated]
    assert (folder / "mine.jpg").read_bytes() == before


def test_which_pictures_are_the_users_own(make, make_config, tmp_path):
    """Those that a look is for: ours are what the model draws, and no more than the run takes."""
    make(count=2)
    for name in ("mine", "yours"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / "class" / f"{name}.png")
    for settings, names in (
        ({"count": 9}, ["mine.png", "yours.png"]),
        ({"count": 1}, ["mine.png"]),
        ({"enabled": False}, []),
        ({"images": str(tmp_path / "none")}, []),
        ({"images": None}, []),
    ):
        config = make_config(prior={"images": str(tmp_path / "class")} | settings)
        assert [picture.name for picture in own_images(config)] == names


def test_a_bad_own_picture_is_named_before_anything_is_generated(make, tmp_path, monkeypatch):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "mine.jpg").write_text("no picture")
    monkeypatch.setattr(room, "_generate", lambda *_: pytest.fail("generated"))
    with pytest.raises(UserError, match=r"mine\.jpg"):
        make()


def test_pictures_of_another_recipe_are_not_mixed_in(make):
    make()
    with pytest.raises(UserError, match=r"made with other settings: steps \(2 -> 3\); delete them, or name another"):
        make(steps=3)


def test_every_picture_knows_its_own_prompt(make, make_config, tmp_path):
    prompts = {"a {class}": 3, "two of {class}": 1}
    images = make(count=40, prompts=prompts, steps=1, batch=20)
    told = Counter(recipe_of(path).prompt for path in images)
    assert told.keys() == {"a ball", "two of ball"} and told["a ball"] > told["two of ball"]
    few = make(folder=tmp_path / "few", count=5, prompts=prompts, steps=1)
    assert [recipe_of(path) for path in few] == [recipe_of(path) for path in images[:5]]
    concept = describe(make_config(), [], images)
    assert [concept.class_prompts[path] for path in images] == [recipe_of(path).prompt for path in images]


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def test_a_picture_follows_from_the_priors_seed_and_its_number(make, tmp_path, monkeypatch):
    """Its prompt and its noise; which is that of no sample, whose seeds begin at 0."""

    class Draws:
        def draw(self, conditioning, pictures, **how):
            return [noise(picture.seed) for picture in pictures]

    monkeypatch.setattr(room, "drawer_for", lambda *how: Draws())

    def drawn(name, **how):
        images = make(folder=tmp_path / name, count=20, prompts=["a {class}", "two of {class}"], **how)
        return [recipe_of(path).prompt for path in images], [content.tobytes() for content in pixels(images)]

    prompts, contents = drawn("first")
    assert len(set(contents)) == 20 and not {noise(seed).tobytes() for seed in range(1000)} & set(contents)
    assert drawn("other training", train={"seed": 5}) == (prompts, contents)
    others, other_contents = drawn("other seed", seed=1)
    assert others != prompts and not set(other_contents) & set(contents)


SETTINGS = {
    "as it was": ({}, True),
    "other training": ({"train": {"seed": 5, "lr": 1e-3}, "output": {"name": "other"}, "model": {"name": "/x"}}, True),
    "other words for the same": ({"prior": {"prompts": ["a photo of a ball"]}}, True),
    "the seed": ({"prior": {"seed": 1}}, False),
    "the prompt": ({"prior": {"prompt": "a {class}"}}, False),
    "weights": ({"prior": {"prompts": {"a photo of a {class}": 2, "a {class}": 1}}}, False),
    "the resolution": ({"train": {"resolution": 128}}, False),
    "the sampler": ({"prior": {"guidance": 1.0}}, False),
}


@pytest.mark.parametrize("sections, same", SETTINGS.values(), ids=SETTINGS)
def test_runs_share_a_folder_where_they_would_make_the_same(make_config, sections, same):
    there = shared_folder(make_config(), "digest")
    assert (shared_folder(make_config(**sections), "digest") == there) == same
    assert shared_folder(make_config(), "another") != there


@pytest.mark.parametrize("noun", ["a/b: c?", "犬" * 90, "con", " "])
def test_any_noun_makes_a_folder(make_config, noun):
    name = shared_folder(make_config(subject={"class": f"x{noun}"}), "digest").name
    assert folder_name.problem(name) is None


def test_a_picture_of_another_model_is_another_recipe(make):
    make()
    with pytest.raises(UserError, match="made with other settings: the model; delete them"):
        make(base="another")


def test_the_folder_holds_nothing_but_pictures(make, tmp_path):
    """Other trainers open every file there; what half-written pictures a kill has left goes, and no file of others."""
    folder = tmp_path / "class"
    folder.mkdir()
    for name in (".class-00001.png.partial-01234567", ".mine.partial-01234567"):
        (folder / name).write_bytes(b"half")
    make()
    names = [f"class-{number:05d}.png" for number in range(5)]
    assert sorted(path.name for path in folder.iterdir()) == [".mine.partial-01234567", *names]


def test_a_picture_of_the_users_may_be_called_like_ours(make, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (30, 30), "green").save(folder / "class-00001.png")
    before = (folder / "class-00001.png").read_bytes()
    names = [path.name for path in make(count=3)]
    assert names == ["class-00001.png", "class-00000.png", "class-00002.png"]
    assert (folder / "class-00001.png").read_bytes() == before


@pytest.mark.parametrize("left", [0, 5, 60, 400, -1], ids=["empty", "in the signature", "no pixels", "half", "zeros"])
def test_what_a_power_cut_leaves_of_a_picture_is_made_anew(make, left):
    images = make()
    straight = pixels(images)
    content = images[2].read_bytes()
    images[2].write_bytes(bytes(len(content)) if left < 0 else content[:left])
    for one, other in zip(pixels(make()), straight, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1  # another batch size may round differently


def test_a_damaged_picture_of_the_users_is_theirs_to_mend(make, tmp_path):
    """Called like ours, but with pixels that we did not make."""
    (tmp_path / "class").mkdir()
    mine = tmp_path / "class" / "class-00000.png"
    Image.effect_noise((40, 40), 99).save(mine)
    mine.write_bytes(mine.read_bytes()[:400])
    with pytest.raises(UserError, match=r"class-00000\.png: damaged or cut off"):
        make()
    assert len(mine.read_bytes()) == 400


def test_how_many_of_how_many_is_said_first(make, tmp_path, capfd):
    make()
    assert f"class images: 0 of your own in {tmp_path / 'class'}; making 5 into it" in capfd.readouterr().err
    Image.new("RGB", (30, 30), "green").save(tmp_path / "class" / "mine.png")
    make(count=7)
    assert "class images: 1 of your own and 5 made before in" in capfd.readouterr().err
    make(count=3)
    assert f"class images: 3 of 7 in {tmp_path / 'class'}" in capfd.readouterr().err


def test_nothing_is_written_where_nothing_is_made(make, tmp_path, monkeypatch):
    make()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "class", *(tmp_path / "class").iterdir())}
    monkeypatch.setattr(room, "_claimed", lambda folder: pytest.fail("claimed"))
    make()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_pictures_one_folder_further_down_are_pointed_at(make, tmp_path):
    (tmp_path / "class" / "1_dog").mkdir(parents=True)
    Image.new("RGB", (30, 30), "green").save(tmp_path / "class" / "1_dog" / "mine.png")
    with pytest.raises(
        UserError, match=r"prior\.images: no pictures in .*class itself, but in .*1_dog; name that folder"
    ):
        make()
    assert [path.name for path in (tmp_path / "class").iterdir()] == ["1_dog"]


@pytest.mark.parametrize("same", [True, False])
def test_two_runs_do_not_mix_their_pictures(make, tmp_path, same, capfd):
    """The second waits for the first, and takes its pictures where it would make the same."""
    with ThreadPoolExecutor() as pool, room._claimed(tmp_path / "class"):
        second = pool.submit(make, steps=2 if same else 3)
        while "another run is making class images there" not in capfd.readouterr().err:
            time.sleep(0.01)
        made = make(folder=tmp_path / "elsewhere")
        for path in made:
            shutil.copy(path, tmp_path / "class")
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "class").glob("*.png")}
    if same:
        assert {path: path.stat().st_mtime_ns for path in second.result()} == times, "they were made again"
        assert all(np.array_equal(*pair) for pair in zip(pixels(second.result()), pixels(made), strict=True))
    else:
        with pytest.raises(UserError, match=r"made with other settings: steps \(2 -> 3\)"):
            second.result()


@pytest.mark.parametrize("drawn", ["NaN", "one pixel NaN", "black", "grey"])
def test_a_model_that_draws_nothing_ends_the_run_before_it_trains(make, tmp_path, monkeypatch, drawn):
    pixels = torch.full((1, 3, 64, 64), {"NaN": torch.nan, "grey": 0.5}.get(drawn, -1.0))
    if drawn == "one pixel NaN":
        pixels.uniform_(generator=torch.Generator().manual_seed(0))[0, 0, 0, 0] = torch.nan
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, *_, **__: (pixels,))
    with pytest.raises(UserError, match="no numbers" if "NaN" in drawn else "a single colour"):
        make()
    assert not list((tmp_path / "class").iterdir())


def test_fewer_are_made_at_once_where_memory_is_full(make, tmp_path, monkeypatch, capfd):
    straight, tried = pixels(make(folder=tmp_path / "straight")), []

    sampler = StableDiffusion.sampler

    def small(family, denoiser):
        def pipeline(generator, **inputs):
            tried.append(len(generator))
            if len(generator) > 1:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            return sampler(family, denoiser)(generator=generator, **inputs)

        return pipeline

    monkeypatch.setattr(StableDiffusion, "sampler", small)
    for one, other in zip(pixels(make()), straight, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1  # another batch size may round differently
    assert tried == [2, 1, 1, 1, 1, 1]
    assert "pictures: out of memory; 1 at once from here on" in capfd.readouterr().err
