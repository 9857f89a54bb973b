from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lowvram_db.cache import Cached, ClassFrame, Frame, View
from lowvram_db.concept import Concept
from lowvram_db.train.batches import Batches


class MemoryStore:
    """Moments whose mean is a number of the key's own."""

    def stack(self, keys):
        numbers = torch.tensor([float(key[1:].partition("/")[0]) for key in keys])
        return {"mean": numbers[:, None, None, None], "logvar": torch.zeros(len(keys), 1, 1, 1)}


SQUARE = (8, 8)


def make(photos, classes, size, prompts=("p",), seed=0, sizes=(SQUARE,), variants=1, **said):
    """Photos i0, i1, ... of alternating sizes, class images numbered on from there."""
    instance = [Path(f"i{number}") for number in range(photos)]
    prior = [Path(f"c{number}") for number in range(photos, photos + classes)]
    frames = {path: Frame(str(path), [View.of((9, 9), sizes[number % len(sizes)])] * variants,
                          [f"{path}/{v}" if v else str(path) for v in range(variants)])
              for number, path in enumerate(instance)}  # fmt: skip
    used = sorted({frame.size for frame in frames.values()})
    keys = {path: {shape: f"{path}/{shape}" if shape != SQUARE else str(path) for shape in used} for path in prior}
    views = {shape: View.of((9, 9), shape) for shape in used}
    class_photos = {path: ClassFrame(str(path), views, keys[path]) for path in prior}
    return Batches(
        Concept(instance, list(prompts), prior, "class", **said),
        Cached(MemoryStore(), frames, class_photos, {"class": "c"}),
        size,
        seed,
    )


@given(photos=st.integers(1, 6), classes=st.integers(0, 9), size=st.integers(1, 4), seed=st.integers(0, 99))
def test_an_epoch_shows_every_photo_once(photos, classes, size, seed):
    batches = make(photos, classes, size, seed=seed)
    rows = 2 * size if classes else size
    seen = [batches[step].moments.mean.flatten().tolist() for step in range(photos * (classes or 1))]
    assert all(len(values) == rows for values in seen)
    instances = Counter(value for values in seen for value in values[:size])
    priors = Counter(value for values in seen for value in values[size:])
    assert set(instances.values()) == {size * (classes or 1)}
    assert sorted(instances) == list(range(photos))
    if classes:
        assert set(priors.values()) == {size * photos}
        assert sorted(priors) == list(range(photos, photos + classes))


def test_rows_are_subject_first_then_class():
    batch = make(3, 5, 2)[7]
    assert batch.prompts == ["p", "p", "class", "class"]
    assert batch.instances == 2
    assert batch.moments.mean.shape == (4, 1, 1, 1)


def test_content_is_that_of_the_pictures():
    assert make(1, 2, 1).content == {"photos": ["i0"], "class images": ["c1", "c2"], "captions": [], "masks": []}


def test_content_is_that_of_captions_too_by_the_pictures_that_they_are_of():
    own = {"captions": {Path("i0"): ["x", "y"]}, "class_prompts": {Path("c1"): "z"}}
    assert make(1, 1, 1, **own).content["captions"] == ["c1 z", "i0 x", "i0 y"]


@given(names=st.permutations(range(5)), sizes=st.sampled_from([(SQUARE,), (SQUARE, (4, 16))]))
def test_photos_by_other_names_are_shown_in_the_same_order(names, sizes):
    """A file's name decides nothing: the digest of its pixels does."""
    before = make(5, 2, 2, sizes=sizes)
    renamed = dict(zip(before.concept.instance_photos, (Path(f"r{name}") for name in names), strict=True))
    frames = {renamed[path]: frame for path, frame in before.cached.photos.items()}
    after = replace(
        before,
        concept=replace(before.concept, instance_photos=sorted(frames)),
        cached=replace(before.cached, photos=frames),
    )
    for step in range(10):
        assert torch.equal(before[step].moments.mean, after[step].moments.mean)


def test_a_step_is_the_same_whenever_it_is_asked_for():
    batches = make(5, 7, 2, prompts=("a", "b", "c"))
    late = batches[40]
    for step in range(40):
        batches[step]
    assert torch.equal(batches[40].moments.mean, late.moments.mean)
    assert batches[40].prompts == late.prompts


def test_order_changes_with_the_epoch_and_the_seed():
    def order(batches, epoch):
        return [batches[step].moments.mean[0].item() for step in range(epoch * 6, epoch * 6 + 6)]

    assert len({tuple(order(make(6, 0, 1), epoch)) for epoch in range(10)}) > 5
    assert order(make(6, 0, 1, seed=1), 0) != order(make(6, 0, 1, seed=2), 0)


WORDS = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=5, unique=True)
_DRAWN = 300  # steps


@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**62), size=st.integers(1, 3), dropout=st.sampled_from([0.0, 0.3]))
def test_every_drawn_prompt_is_in_the_cache_as_often_as_its_weight_says(data, seed, size, dropout):
    """And a run that goes on draws the same: a batch knows nothing but its number."""
    prompts, own, of_class = data.draw(WORDS), data.draw(WORDS), data.draw(st.text(max_size=3))
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]), min_size=len(prompts), max_size=len(prompts)))
    weights[0] += 0.25
    said = {
        "weights": weights,
        "captions": {Path("i1"): own},
        "class_prompts": {Path("c2"): of_class},
        "caption_dropout": dropout,
    }
    batches = make(2, 2, size, prompts, seed, **said)
    shown = [batches[step] for step in range(_DRAWN)]
    drawn = [batch.prompts for batch in shown]
    assert {prompt for row in drawn for prompt in row} <= set(batches.concept.prompts)
    of_pictures = {
        (number, prompt) for batch in shown for number, prompt in zip(numbers(batch), batch.prompts, strict=True)
    }
    assert {pair for pair in of_pictures if pair[0] >= 2} == {(2.0, of_class), (3.0, "class")}
    again = make(2, 2, size, prompts, seed, **said)
    assert [again[step].prompts for step in range(_DRAWN // 2, _DRAWN)] == drawn[_DRAWN // 2 :]

    wanted = Counter({"": dropout})
    for text, weight in zip(prompts, weights, strict=True):
        wanted[text] += (1 - dropout) / 2 * weight / sum(weights)
    for text in own:
        wanted[text] += (1 - dropout) / 2 / len(own)
    counts, rows = Counter(prompt for row in drawn for prompt in row[:size]), _DRAWN * size
    for text, share in wanted.items():  # each photo is in half of the rows
        assert abs(counts[text] - rows * share) <= 7 * (rows * share * (1 - share)) ** 0.5 + 1, (text, share)
        assert share or not counts[text]


def numbers(batch):
    """Of the rows' pictures."""
    return batch.moments.mean.flatten().tolist()


def rows_of(batches, step):
    """The keys of a step's rows."""
    asked = []

    class Asking(MemoryStore):
        def stack(self, keys):
            asked.extend(keys)
            return super().stack(keys)

    replace(batches, cached=replace(batches.cached, store=Asking()))[step]
    return asked


SIZES = [SQUARE, (16, 4), (4, 16)]


@given(photos=st.integers(1, 7), classes=st.integers(0, 4), size=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_batch_is_of_one_size_and_a_round_shows_every_photo_equally(photos, classes, size, seed):
    batches = make(photos, classes, size, seed=seed, sizes=SIZES)
    sizes = {frame.keys[0]: frame.size for frame in batches.cached.photos.values()}
    sizes |= {key: shape for frame in batches.cached.class_photos.values() for shape, key in frame.keys.items()}
    shown = Counter()
    for step in range(photos * 3):
        keys = rows_of(batches, step)
        assert len({sizes[key] for key in keys}) == 1
        shown.update(keys[:size])
        if (step + 1) % photos == 0:
            assert set(shown.values()) == {size * (step + 1) // photos}
            assert len(shown) == photos


def test_the_order_of_sizes_changes_with_the_round_and_the_seed():
    def order(seed, round_):
        batches = make(6, 0, 1, sizes=SIZES, seed=seed)
        return tuple(rows_of(batches, step)[0] for step in range(round_ * 6, round_ * 6 + 6))

    assert len({order(0, round_) for round_ in range(10)}) > 5
    assert order(1, 0) != order(2, 0)


def test_one_size_is_drawn_as_if_there_were_no_buckets():
    square, wide = make(5, 3, 2), make(5, 3, 2, sizes=[(16, 4)])
    for step in range(20):
        assert torch.equal(square[step].moments.mean, wide[step].moments.mean)


def test_variants_are_drawn_about_equally_and_by_address():
    batches = make(2, 0, 1, variants=4)
    drawn = [rows_of(batches, step)[0] for step in range(400)]
    counts = Counter(drawn)
    assert len(counts) == 8
    assert min(counts.values()) > 400 / 8 * 0.6
    assert drawn[250] == rows_of(make(2, 0, 1, variants=4), 250)[0]


def test_masks_stand_in_the_rows_of_their_photos_and_count_as_content(tmp_path):
    """Of two photos one has a mask, whose left half is white; class images have none."""
    mask = Image.new("L", (18, 18), 0)
    mask.paste(255, (0, 0, 9, 18))
    mask.save(tmp_path / "m.png")
    batches = make(2, 2, 2, masks={Path("i0"): tmp_path / "m.png"}, mask_weight=0.5)
    store = batches.cached.store
    store.stack = lambda keys: {
        name: tensor.expand(-1, 1, 4, 4) for name, tensor in MemoryStore.stack(store, keys).items()
    }
    for step in range(4):
        batch = batches[step]
        assert batch.masks.shape == (4, 1, 4, 4) and torch.equal(batch.masks[2:], torch.ones(2, 1, 4, 4))
        for number, seen in zip(batch.moments.mean[:2, 0, 0, 0].tolist(), batch.masks[:2, 0], strict=True):
            half = torch.tensor([4 / 3, 4 / 3, 2 / 3, 2 / 3]).expand(4, 4)
            torch.testing.assert_close(seen, half if number == 0 else torch.ones(4, 4))
    assert len(batches.content["masks"]) == 1 and make(2, 2, 2)[0].masks is None
