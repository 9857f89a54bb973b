"""Numbers about a miniature model: does it draw its prompt, has it learned the subject, has it kept the class.

Behind bench/demo_base.py and the learning test. A picture is judged by the critic; a likeness is the cosine of two of
its embeddings, and is reported as a share of what held-out pictures of the subject reach among themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from lowvram_db.demo.captions import prompt
from lowvram_db.demo.critic import COLOUR_NAMES, Critic
from lowvram_db.demo.scenes import to_pixels
from lowvram_db.demo.subjects import Subject
from lowvram_db.demo.world import NOUNS, SETTINGS, is_held_out, render, subject_scene

STEPS = 25
GUIDANCE = 2.5
# A picture this like the held-out ones (as a share of their own likeness) passes for the subject. Of true pictures of
# it, encoded and decoded, a twentieth does not pass; of true pictures of other jellyfish one in a hundred does.
MISTAKEN_FROM = 0.65


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for, as the critic can check it."""

    noun: str
    colour: str
    setting: str


def prompts_to_check(count: int, unseen: bool) -> list[Asked]:
    """Random (class, colour, setting), all of them never seen in training, or all of them seen."""
    rng = Random(f"prompts, unseen {unseen}")
    asked: list[Asked] = []
    while len(asked) < count:
        one = Asked(rng.choice(NOUNS), rng.choice(COLOUR_NAMES), rng.choice(SETTINGS))
        if is_held_out(one.noun, one.colour, one.setting) == unseen:
            asked.append(one)
    return asked


def first_noise(count: int, seed: int) -> Tensor:
    """Starting latents (count, 4, 16, 16): picture i of a seed starts from the same noise in every call."""
    draws = [np.random.default_rng((seed, i)).standard_normal((4, 16, 16), dtype=np.float32) for i in range(count)]
    return torch.from_numpy(np.stack(draws))


@torch.inference_mode()
def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 50,
) -> Tensor:
    """Pictures (N, 3, 64, 64) in [-1, 1], one a prompt."""
    noise, parts = first_noise(len(prompts), seed).to(pipeline.device, pipeline.unet.dtype), []
    for start in range(0, len(prompts), batch):
        chosen = slice(start, start + batch)
        made = pipeline(
            list(prompts[chosen]),
            latents=noise[chosen],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=64,
            width=64,
            output_type="pt",
        )
        parts.append(made.images.float() * 2 - 1)
    return torch.cat(parts)


def prompt_accuracy(
    pipeline: StableDiffusionPipeline, critic: Critic, asked: Sequence[Asked], seed: int = 0, steps: int = STEPS
) -> dict[str, float]:
    """Shares of pictures in which the critic finds the class, the colour and the setting of the prompt."""
    pixels = generate(pipeline, [prompt(one.noun, one.colour, one.setting) for one in asked], seed, steps)
    noun, colour, setting, _ = critic.judge(pixels)
    return {
        "class": float(np.mean([NOUNS[i] == one.noun for i, one in zip(noun, asked, strict=True)])),
        "colour": float(np.mean([COLOUR_NAMES[i] == one.colour for i, one in zip(colour, asked, strict=True)])),
        "setting": float(np.mean([SETTINGS[i] == one.setting for i, one in zip(setting, asked, strict=True)])),
    }


def subject_pixels(subject: Subject, settings: Sequence[str], each: int, seed: int) -> Tensor:
    """True pictures of the subject, `each` in every setting: (N, 3, 64, 64)."""
    scenes = [subject_scene(subject, place, seed * 1000 + i) for place in settings for i in range(each)]
    return to_pixels(np.stack([np.asarray(render(scene)) for scene in scenes]))


def likeness(critic: Critic, pixels: Tensor, held_out: Tensor) -> Tensor:
    """For each picture (N,): the mean cosine of its embedding with those of the held-out pictures."""
    return critic.judge(pixels)[3] @ critic.judge(held_out)[3].mean(0)


def likeness_among(critic: Critic, held_out: Tensor) -> float:
    """The mean cosine between different held-out pictures: what a perfect picture of the subject reaches."""
    looks = critic.judge(held_out)[3]
    count = len(looks)
    return ((looks @ looks.T).sum().item() - count) / (count * (count - 1))


def diversity(critic: Critic, pixels: Tensor) -> float:
    """The mean pairwise distance (1 - cosine) of the pictures' embeddings."""
    return 1 - likeness_among(critic, pixels)


@dataclass(frozen=True)
class Learned:
    """What a model shows of a subject. Likenesses are shares of what held-out pictures reach among themselves."""

    own: float  # likeness of pictures for the bare instance prompt
    elsewhere: float  # likeness of pictures in settings the photos did not have
    setting_right: float  # share of those pictures that are in the setting of their prompt
    mistaken: float  # share of pictures for the class prompt that pass for the subject
    diversity: float  # mean pairwise distance of pictures for the class prompt


def learned(
    pipeline: StableDiffusionPipeline, critic: Critic, subject: Subject, instance: str, each: int = 4, seed: int = 0
) -> Learned:
    """Draws the subject by `instance`, the prompt it was trained under, bare and in eight settings its photos did not
    have, and the class without its word."""
    held_out = subject_pixels(subject, SETTINGS, 4, seed=1)
    ceiling = likeness_among(critic, held_out)
    places = [place for place in SETTINGS if place not in subject.photographed][:8] * each
    own = generate(pipeline, [instance] * 4 * each, seed)
    elsewhere = generate(pipeline, [f"{instance} {place}" for place in places], seed + 1)
    plain = generate(pipeline, [prompt(subject.noun)] * 8 * each, seed + 2)
    found = [SETTINGS[i] for i in critic.judge(elsewhere)[2]]
    return Learned(
        own=likeness(critic, own, held_out).mean().item() / ceiling,
        elsewhere=likeness(critic, elsewhere, held_out).mean().item() / ceiling,
        setting_right=float(np.mean([a == b for a, b in zip(found, places, strict=True)])),
        mistaken=(likeness(critic, plain, held_out) / ceiling > MISTAKEN_FROM).float().mean().item(),
        diversity=diversity(critic, plain),
    )
