import gc
import shutil
import sys
import threading

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from lowvram_db.cache import Framing, Store, View, catalogue, precompute
from lowvram_db.cache.encoder import ImageEncoder
from lowvram_db.errors import UserError
from lowvram_db.families import open_model
from lowvram_db.families.base import Moments
from lowvram_db.framing import to_float
from lowvram_db.photos import load_photo

CPU = torch.device("cpu")
MODULE = sys.modules["lowvram_db.cache.precompute"]  # the package has a function of that name
PROMPTS = ["a photo of a pkblz ball", "a photo of a ball"]


def moments_of(cached, photo, variant=0):
    """What is in the store of one photo, read by a store of its own: float32 [1, C, h, w] each."""
    with Store(cached.store.folder) as store:
        return Moments(**store.stack([cached.photos[photo].keys[variant]]))


def live(counting, photo, view):
    family = counting.family
    with torch.no_grad():
        return family.encode_images(family.load_vae(), to_float(view.pixels(load_photo(photo)))[None])


def test_cached_values_are_the_encoders_own(counting, photo_files, build):
    cached = build(counting, photo_files, PROMPTS)
    text_encoders = counting.load_text_encoders()
    for photo in photo_files:
        for got, wanted in zip(
            moments_of(cached, photo), live(counting, photo, View.of((96, 96), (64, 64))), strict=True
        ):
            assert torch.equal(got, wanted)
            assert got.shape == (1, 4, 8, 8)
    with torch.no_grad():
        wanted = torch.cat([counting.encode_prompts(text_encoders, [prompt])["text"] for prompt in PROMPTS])
    with Store(cached.store.folder) as store:
        conditioning = store.stack([cached.prompts[prompt] for prompt in PROMPTS])["text"]
    assert torch.equal(conditioning, wanted)
    assert not conditioning.requires_grad


def test_a_thousand_draws_have_the_vaes_own_mean_and_variance(base_family, photos, build):
    """Cached moments, sampled, against `vae.encode(x).latent_dist.sample()`, within five standard errors.

    The shipped base model, whose posterior is a trained one.
    """
    photo, draws = sorted(photos.iterdir())[0], 1000
    mean, logvar = moments_of(build(base_family, [photo]), photo)
    torch.manual_seed(0)
    cached = mean + torch.exp(0.5 * logvar) * torch.randn(draws, *mean.shape[1:])
    vae = base_family.load_vae()
    with torch.no_grad():
        pixels = to_float(View.of((96, 96), (64, 64)).pixels(load_photo(photo)))[None]
        posterior = vae.encode(pixels).latent_dist
        alive = torch.cat([posterior.sample() for _ in range(draws)]) * vae.config.scaling_factor
    spread = alive.std(0)
    assert spread.min() > 0
    assert ((cached.mean(0) - alive.mean(0)).abs() < 5 * spread * (2 / draws) ** 0.5).all()
    ratio = cached.var(0) / alive.var(0)
    assert ((ratio - 1).abs() < 5 * (4 / draws) ** 0.5).all()
    assert abs(ratio.mean() - 1) < 5 * (4 / draws / ratio.numel()) ** 0.5


def test_the_encoders_are_gone_afterwards(counting, photo_files, build):
    """Not only unreachable by name: no weight of them is left in the process."""
    build(counting, photo_files, PROMPTS)
    assert len(counting.alive) > 50
    assert not counting.living()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, AutoencoderKL | CLIPTextModel)]


def test_a_second_time_encodes_and_decodes_nothing(counting, photo_files, build, monkeypatch):
    monkeypatch.setattr(catalogue, "_SETTLED_SECONDS", -1.0)
    first = build(counting, photo_files, PROMPTS)
    assert counting.counts() == (5, 2)
    monkeypatch.setattr(catalogue, "decode_photo", lambda *_: pytest.fail("a photo was decoded"))
    second = build(counting, photo_files, PROMPTS)
    assert counting.counts() == (0, 0)
    assert (first.photos, first.prompts) == (second.photos, second.prompts)


def test_only_what_changed_is_encoded_again(counting, photo_files, build):
    before = build(counting, photo_files, PROMPTS)
    assert counting.counts() == (5, 2)
    Image.effect_noise((80, 80), 60).save(photo_files[2])
    photo_files[0].touch()
    after = build(counting, photo_files, [*PROMPTS, "new"])
    assert counting.counts() == (1, 1)
    assert [before.photos[p] == after.photos[p] for p in photo_files] == [True, True, False, True, True]
    assert not torch.equal(moments_of(before, photo_files[2]).mean, moments_of(after, photo_files[2]).mean)
    build(counting, photo_files, PROMPTS, framing=Framing(32))
    assert counting.counts() == (5, 0), "another resolution is another latent"


def test_renamed_swapped_and_doubled_photos_are_encoded_once(counting, photo_files, build, monkeypatch):
    before = build(counting, photo_files)
    counting.counts()
    a, b = photo_files[:2]
    contents = a.read_bytes(), b.read_bytes()
    a.write_bytes(contents[1])
    b.write_bytes(contents[0])
    renamed = photo_files[2].rename(photo_files[2].with_name("renamed.png"))
    copy = renamed.with_name("copy.bmp")
    load_photo(renamed).save(copy)  # the same pixels in another file format
    after = build(counting, [a, b, renamed, copy])
    assert counting.counts() == (0, 0)
    assert (after.photos[a], after.photos[b]) == (before.photos[b], before.photos[a])
    assert after.photos[renamed] == after.photos[copy] == before.photos[photo_files[2]]
    for at_once in (1, 4):
        monkeypatch.setattr(ImageEncoder, "batch", lambda *_, at_once=at_once: at_once)
        build(counting, [renamed, copy], folder=a.parent.parent / f"other-{at_once}")
        assert counting.counts() == (1, 0), "the same photo twice is encoded once"


def test_variants_and_buckets(counting, photo_files, build):
    wide = photo_files[1]
    load_photo(wide).resize((160, 100)).save(wide)
    framing = Framing(64, "buckets", variants=3, flip=True, seed=5, multiple=16)
    class_photos = photo_files[3:]
    cached = build(counting, photo_files[:3], framing=framing, class_photos=class_photos)
    assert counting.counts() == (3 * 3 + 2 * 2, 0)
    assert [cached.photos[photo].size for photo in photo_files[:3]] == [(64, 64), (80, 48), (64, 64)]
    for photo in photo_files[:3]:
        seen = load_photo(photo)
        for variant, view in enumerate(framing.views(seen.size, catalogue.pixels_digest(seen))):
            assert torch.equal(moments_of(cached, photo, variant).mean, live(counting, photo, view).mean)
    assert moments_of(cached, wide).mean.shape == (1, 4, 6, 10)
    for photo in class_photos:
        assert set(cached.class_photos[photo].keys) == {(64, 64), (80, 48)}
        with Store(cached.store.folder) as store:
            got = store.stack([cached.class_photos[photo].keys[80, 48]])["mean"]
        assert torch.equal(got, live(counting, photo, View.of((96, 96), (80, 48))).mean)


def test_a_damaged_entry_is_encoded_again(counting, photo_files, build, tmp_path, capfd):
    cached = build(counting, photo_files, PROMPTS)
    values = [moments_of(cached, photo).mean for photo in photo_files]
    (victim,) = (tmp_path / "cache" / "v3").glob("*.safetensors")
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    counting.counts()
    again = build(counting, photo_files, PROMPTS)
    assert sum(counting.counts()) == 1
    assert "an entry is damaged; it is encoded again" in capfd.readouterr().err
    assert all(
        torch.equal(moments_of(again, photo).mean, value) for photo, value in zip(photo_files, values, strict=True)
    )
    with Store(tmp_path / "cache", writable=False) as store:
        assert not store.verify()


@pytest.mark.parametrize("content", [b"no photo", b""])
def test_what_was_encoded_before_an_error_is_kept(counting, photo_files, build, content):
    bad = photo_files[0].with_name("bad.jpg")
    bad.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.jpg: not an image"):
        build(counting, [*photo_files, bad], PROMPTS)
    assert counting.counts() == (5, 2)
    build(counting, photo_files, PROMPTS)
    assert counting.counts() == (0, 0)


def test_a_photo_that_vanishes_is_named_and_the_others_are_kept(counting, photo_files, build, monkeypatch):
    """The catalogue still vouches for it; its entry is wanted at another resolution when it has gone."""
    monkeypatch.setattr(catalogue, "_SETTLED_SECONDS", -1.0)
    build(counting, photo_files)
    encode, gone = counting.encode_images, photo_files[-1]

    def encode_and_lose(vae, pixels):
        gone.unlink(missing_ok=True)
        return encode(vae, pixels)

    counting.counts()
    monkeypatch.setattr(MODULE, "_DECODERS", 1)
    monkeypatch.setattr(counting, "encode_images", encode_and_lose)
    with pytest.raises(UserError, match=rf"{gone.name}: is not there any more"):
        build(counting, photo_files, framing=Framing(32))
    assert counting.counts() == (4, 0)
    build(counting, photo_files[:-1], framing=Framing(32))
    assert counting.counts() == (0, 0)


def test_a_photo_of_20000_pixels(counting, build, tmp_path):
    long = tmp_path / "long.png"
    Image.linear_gradient("L").resize((20_000, 300)).save(long)
    cached = build(counting, [long], framing=Framing(64, "buckets", multiple=16))
    assert cached.photos[long].size == (80, 48)


def test_ctrl_c_keeps_what_is_done(counting, photo_files, build, monkeypatch):
    encode = counting.encode_images

    def interrupted(vae, pixels):
        if counting.images == 3:
            raise KeyboardInterrupt
        return encode(vae, pixels)

    monkeypatch.setattr(counting, "encode_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(counting, photo_files)
    assert not counting.living()
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
    monkeypatch.undo()
    counting.counts()
    build(counting, photo_files)
    assert counting.counts() == (2, 0)


def test_a_full_disk_keeps_what_is_done(counting, build, tmp_path, small_disk, monkeypatch):
    monkeypatch.setattr("lowvram_db.cache.store._SHARD_SECONDS", 0.0)
    monkeypatch.setattr(MODULE, "_DECODERS", 1)
    disk, photos = small_disk("200k"), [tmp_path / f"{number:03d}.png" for number in range(200)]
    for number, photo in enumerate(photos):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(photo)
    with pytest.raises(UserError, match="the disk is full"):
        build(counting, photos, folder=disk / "cache")
    done, _ = counting.counts()
    with Store(disk / "cache", writable=False) as store:
        assert done - 1 <= store.report().photos <= done
        assert not store.verify()


def test_two_builds_at_once_share_the_work(counting, photo_files, build, tmp_path, monkeypatch):
    """Another process stores what this one was about to encode."""
    monkeypatch.setattr(MODULE, "_REFRESH_SECONDS", -1.0)
    build(counting, photo_files, folder=tmp_path / "other")
    counting.counts()
    encode = counting.encode_images

    def meanwhile(vae, pixels):
        for shard in (tmp_path / "other" / "v3").glob("*.safetensors"):
            shutil.copy(shard, tmp_path / "cache" / "v3")
        return encode(vae, pixels)

    monkeypatch.setattr(counting, "encode_images", meanwhile)
    build(counting, photo_files)
    assert counting.counts() == (1, 0)


@pytest.fixture
def edited_model(miniature, tmp_path):
    """A copy of the miniature, one of whose parts gets its weights through a function."""
    from safetensors.torch import load_file, save_file

    def make(part, edit):
        copy = shutil.copytree(miniature, tmp_path / "model")
        (weights,) = (copy / part).glob("*.safetensors")
        tensors = load_file(weights)
        edit(tensors)
        save_file(tensors, weights, metadata={"format": "pt"})
        return open_model(str(copy))

    return make


@pytest.mark.parametrize(("part", "counts"), [("vae", (5, 0)), ("text_encoder", (0, 2))])
def test_another_encoder_is_another_key(counting, photo_files, build, edited_model, part, counts):
    build(counting, photo_files, PROMPTS)

    def last_bit(tensors):
        next(iter(tensors.values())).view(torch.int32).view(-1)[0] ^= 1

    changed = type(counting)(edited_model(part, last_bit))
    build(changed, photo_files, PROMPTS)
    assert changed.counts() == counts


def test_trained_text_encoders_share_no_entry_with_others(counting, build, tmp_path):
    """What is cached of them is what transformers' own encoder says with their weights."""
    untrained = build(counting, [], PROMPTS)
    weights = counting.load_text_encoders()["text_encoder"].state_dict()
    tuned = {f"text_encoder.{name}": 1.01 * weight for name, weight in weights.items()}
    once_more = {**tuned, "text_encoder.final_layer_norm.bias": tuned["text_encoder.final_layer_norm.bias"] + 1e-6}
    half = {name: weight.bfloat16() for name, weight in tuned.items()}
    keys = set(untrained.prompts.values())
    for trained in (tuned, once_more, half):
        family = type(counting)(counting.family.with_tuned(trained))
        cached = build(family, [], PROMPTS)
        assert family.counts() == (0, 2)
        assert not keys & set(cached.prompts.values())
        keys |= set(cached.prompts.values())
        encoder = CLIPTextModel.from_pretrained(counting.family.folder / "text_encoder")
        encoder.load_state_dict({name.removeprefix("text_encoder."): tensor for name, tensor in trained.items()})
        tokenizer = CLIPTokenizer.from_pretrained(counting.family.folder / "tokenizer")
        tokens = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with Store(cached.store.folder) as store, torch.no_grad():
            text = store.stack([cached.prompts[prompt] for prompt in PROMPTS])["text"]
            torch.testing.assert_close(text, encoder(tokens).last_hidden_state, rtol=1e-5, atol=1e-6)
    again = type(counting)(counting.family.with_tuned({name: tensor.clone() for name, tensor in tuned.items()}))
    build(again, [], PROMPTS)
    build(counting, [], PROMPTS)
    assert again.counts() == (0, 0) and counting.counts() == (0, 2), "only the untrained ones, and those once"


def test_weights_are_digested_once(counting, photo_files, build, monkeypatch):
    monkeypatch.setattr(catalogue, "_SETTLED_SECONDS", -1.0)
    build(counting, photo_files, PROMPTS)
    monkeypatch.setattr(catalogue.hashlib, "file_digest", lambda *_: pytest.fail("a file was digested again"))
    build(counting, photo_files, PROMPTS)


def overflowing(tensors):
    """The first convolution's output no longer fits float16; a group norm follows, which takes the scale out again."""
    tensors["encoder.conv_in.weight"] *= 1e6


def test_what_overflows_in_half_precision_is_encoded_in_float32(counting, photo_files, build, edited_model, capfd):
    overflows = type(counting)(edited_model("vae", overflowing))
    cached = build(overflows, photo_files, PROMPTS, dtype=torch.float16)
    assert overflows.loaded == [torch.float16, torch.float16, torch.float32], "text, VAE, and the VAE once more"
    assert "5 photos overflowed the VAE in float16 and were encoded in float32" in capfd.readouterr().err
    for photo in photo_files:
        wanted = live(overflows, photo, View.of((96, 96), (64, 64)))
        assert wanted.mean.isfinite().all()
        assert torch.equal(moments_of(cached, photo).mean, wanted.mean)
    overflows.counts()
    build(overflows, photo_files, PROMPTS, dtype=torch.float16)
    assert overflows.counts() == (0, 0)


def test_a_prompt_that_overflows_is_encoded_in_float32(counting, build, edited_model):
    """The last norm's weight fits float16; what it makes of half the prompts' tokens does not."""

    def large(tensors):
        (name,) = (name for name in tensors if name.endswith("final_layer_norm.weight"))
        tensors[name].fill_(60_000.0)

    overflows = type(counting)(edited_model("text_encoder", large))
    cached = build(overflows, [], PROMPTS, dtype=torch.float16)
    assert overflows.loaded == [torch.float16, torch.float32]
    with torch.no_grad():
        wanted = torch.cat(
            [overflows.family.encode_prompts(overflows.family.load_text_encoders(), [p])["text"] for p in PROMPTS]
        )
    with Store(cached.store.folder) as store:
        got = store.stack([cached.prompts[prompt] for prompt in PROMPTS])["text"]
    assert wanted.isfinite().all() and wanted.max() > 65504
    assert torch.equal(got, wanted)


def test_what_is_finite_in_half_precision_stays_there(counting, photo_files, build):
    half = build(counting, photo_files, PROMPTS, dtype=torch.float16)
    assert counting.loaded == [torch.float16, torch.float16]
    exact = build(counting, photo_files, PROMPTS)
    assert half.photos[photo_files[0]] != exact.photos[photo_files[0]], "another precision is another entry"
    one, other = (moments_of(cached, photo_files[0]).mean for cached in (half, exact))
    assert one.dtype == torch.float32
    assert 0 < (one - other).abs().max() < 0.02 * other.std()


def test_a_vae_that_makes_no_numbers_is_named(counting, photo_files, build, edited_model):
    broken = type(counting)(edited_model("vae", lambda tensors: tensors["encoder.conv_in.weight"].fill_(3e38)))
    with pytest.raises(UserError, match=r"00\.png: the VAE makes no finite numbers of it"):
        build(broken, photo_files[:1])


def test_prompts_alone_and_photos_alone(counting, photo_files, build):
    assert build(counting, [], PROMPTS).photos == {}
    assert counting.counts() == (0, 2)
    assert build(counting, photo_files, []).prompts == {}
    assert counting.counts() == (5, 0)


def test_reading_goes_through_cached(counting, photo_files, tmp_path):
    with Store(tmp_path / "cache") as store:
        cached = precompute(counting, store, CPU, framing=Framing(64), photos=photo_files, prompts=PROMPTS)
        moments = cached.moments([cached.photos[photo].keys[0] for photo in photo_files])
        assert moments.mean.shape == moments.logvar.shape == (5, 4, 8, 8)
        assert cached.conditioning([*PROMPTS, PROMPTS[0]])["text"].shape == (3, 77, 32)
        with pytest.raises(KeyError):
            cached.conditioning(["never encoded"])
        shutil.rmtree(tmp_path / "cache" / "v3")
        store._checked.clear()
        store._mapped.clear()
        for shard in store._shards.values():
            shard.close()
        with pytest.raises(UserError, match="cache: an entry was damaged or deleted in use; run the command again"):
            cached.moments([cached.photos[photo_files[0]].keys[0]])
        (tmp_path / "cache" / "v3").mkdir()
    assert not list(tmp_path.glob("**/.*partial*"))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["CACHEDIR.TAG", "v3"]
