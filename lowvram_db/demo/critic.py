"""The critic: a small CNN that says what a picture shows, and how alike two individuals are.

It judges the base model and every DreamBooth run on it. Heads: class noun, colour, setting; and a unit vector in
which pictures of one individual lie close together, whatever their setting and pose. The vector is learned from pairs
of pictures of thousands of looks (InfoNCE, van den Oord et al. 2018), with colour channels swapped at random, so that
looks outside the world's colours have their place too. Half of each batch are looks of one class, since individuals of
a class are what it must tell apart. Half of these pictures have gone through the autoencoder: what a model draws is as
soft as that, and an individual must not become another by being soft.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram_db.demo.looks import COLOURS
from lowvram_db.demo.scenes import VIEWS, critic_scene, held_out_scene, to_pixels
from lowvram_db.demo.stage import Budget, Fit
from lowvram_db.demo.world import NOUNS, SETTINGS, Scene, training_scene

CRITIC_FILE = Path(__file__).parent / "critic.safetensors"
COLOUR_NAMES = tuple(COLOURS)
EMBEDDING = 64
TEMPERATURE = 0.1
WIDTHS = (24, 48, 96, 144)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Critic(nn.Module):
    """Pixels (B, 3, 64, 64) in [-1, 1] -> logits of class, colour, setting, and embeddings (B, 64) of length 1."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), Residual(width)]
        self.trunk = nn.Sequential(*layers, nn.GroupNorm(8, WIDTHS[-1]), nn.SiLU())
        features = 2 * WIDTHS[-1]
        self.noun = nn.Linear(features, len(NOUNS))
        self.colour = nn.Linear(features, len(COLOUR_NAMES))
        self.setting = nn.Linear(features, len(SETTINGS))
        self.look = nn.Sequential(nn.Linear(features, 160), nn.SiLU(), nn.Linear(160, EMBEDDING))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        maps = self.trunk(pixels)
        features = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)
        return (
            self.noun(features),
            self.colour(features),
            self.setting(features),
            F.normalize(self.look(features), dim=1),
        )

    @torch.inference_mode()
    def judge(self, pixels: Tensor, batch: int = 100) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Indices of class, colour and setting (B,), and embeddings (B, 64)."""
        parts = [self(part) for part in pixels.split(batch)]
        noun, colour, setting, look = (torch.cat(column) for column in zip(*parts, strict=True))
        return noun.argmax(1), colour.argmax(1), setting.argmax(1), look


def load_critic(path: Path = CRITIC_FILE) -> Critic:
    critic = Critic()
    critic.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return critic.eval()


def labels_of(scenes: list[Scene]) -> Tensor:
    """Indices (N, 3) of class, colour and setting."""
    rows = [(NOUNS.index(s.noun), COLOUR_NAMES.index(s.look.colour), SETTINGS.index(s.setting)) for s in scenes]
    return torch.tensor(rows)


def accuracy(critic: Critic, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    judged = critic.judge(pixels)
    return {
        name: (judged[i].cpu() == labels[:, i]).float().mean().item()
        for i, name in enumerate(("class", "colour", "setting"))
    }


def _roughen(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Some of the blur, noise and faint colour shift that generated pictures have."""
    count = len(pixels)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.from_numpy(rng.uniform(0, 0.8, (count, 1, 1, 1)).astype(np.float32)).to(pixels)
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32)).to(pixels)
    strength = torch.from_numpy(rng.uniform(0, 0.12, (count, 1, 1, 1)).astype(np.float32)).to(pixels)
    shift = torch.from_numpy(rng.normal(0, 0.04, (count, 3, 1, 1)).astype(np.float32)).to(pixels)
    return pixels + share * (blurred - pixels) + strength * noise + shift


def _same_look_loss(first: Tensor, second: Tensor) -> Tensor:
    """InfoNCE both ways: each picture must find the other picture of its look among all looks of the batch."""
    logits = first @ second.T / TEMPERATURE
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _half_of_one_class(rng: np.random.Generator, nouns: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` different looks, half of them (or all there are) of one class drawn at random."""
    of_one = np.flatnonzero(nouns == rng.choice(nouns))
    alike = rng.permutation(of_one)[: count // 2]
    others = np.setdiff1d(np.arange(len(nouns)), alike)
    return np.concatenate([alike, rng.choice(others, count - len(alike), replace=False)])


def train_critic(
    stream: np.ndarray,
    looks: np.ndarray,
    soft: np.ndarray,
    held_out: np.ndarray,
    budget: Budget,
    folder: Path,
    device: str,
) -> Critic:
    """Learns class, colour and setting on the stream, likeness on `looks` (VIEWS pictures in a row show one look) and
    `soft`, the same after the autoencoder."""
    torch.manual_seed(2)
    critic = Critic().to(device)
    labels = labels_of([training_scene(i) for i in range(len(stream))]).to(device)
    nouns = np.array([NOUNS.index(critic_scene(first).noun) for first in range(0, len(looks), VIEWS)])
    measured = to_pixels(held_out, device)
    true = labels_of([held_out_scene(i) for i in range(len(held_out))])

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((2, step))
        chosen = np.sort(rng.integers(0, len(stream), budget.batch))
        who = _half_of_one_class(rng, nouns, budget.batch) * VIEWS
        views = np.stack([rng.permutation(VIEWS)[:2] for _ in who], 1)
        places = np.concatenate([who + views[0], who + views[1]])
        choice = rng.random((len(places), 1, 1, 1)) < 0.5
        pairs = to_pixels(np.where(choice, looks[places], soft[places]), device)
        swapped = pairs[:, torch.from_numpy(rng.permutation(3)).to(device)]
        pixels = _roughen(torch.cat([to_pixels(stream[chosen], device), swapped]), rng)
        with torch.autocast(device, torch.bfloat16):
            noun, colour, setting, look = critic(pixels)
        n = budget.batch
        target = labels[torch.from_numpy(chosen).to(device)]
        naming = sum(F.cross_entropy(head[:n].float(), target[:, i]) for i, head in enumerate((noun, colour, setting)))
        return naming + 0.5 * _same_look_loss(look[n : 2 * n].float(), look[2 * n :].float())

    def measure(average: nn.Module) -> dict[str, float]:
        assert isinstance(average, Critic)
        return accuracy(average, measured, true)

    Fit("critic", critic, budget, folder).run(loss_of, measure)
    return critic
