"""The text encoder's first lesson: from a caption, say what the scene holds.

Stable Diffusion's text encoder knew what words mean before any UNet saw it; this one learns it here, from captions
alone, in minutes: class, setting, and every feature of the look, be it said in words or meant by a name. The states
from the end of the text on carry it all, so the UNet finds it wherever it looks. Both then learn on together.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from lowvram_db.demo.captions import caption
from lowvram_db.demo.looks import ADORNMENTS, COLOURS, PATTERNS
from lowvram_db.demo.models import TEXT_WIDTH, make_text_encoder
from lowvram_db.demo.stage import Budget, Fit
from lowvram_db.demo.world import NOUNS, SETTINGS, Scene, training_scene

COLOUR_NAMES = tuple(COLOURS)
QUESTIONS = {
    "class": len(NOUNS),
    "setting": len(SETTINGS),
    "colour": len(COLOURS),
    "pattern": len(PATTERNS),
    "pattern colour": len(COLOURS),
    "adornment": len(ADORNMENTS),
    "adornment colour": len(COLOURS),
}
UNASKED = -100  # cross_entropy passes over it


def answers(scene: Scene) -> list[int]:
    """The right answer to each of QUESTIONS; UNASKED for the colour of what is not there."""
    look = scene.look
    return [
        NOUNS.index(scene.noun),
        SETTINGS.index(scene.setting),
        COLOUR_NAMES.index(look.colour),
        PATTERNS.index(look.pattern),
        COLOUR_NAMES.index(look.pattern_colour) if look.pattern != "plain" else UNASKED,
        ADORNMENTS.index(look.adornment),
        COLOUR_NAMES.index(look.adornment_colour) if look.adornment != "none" else UNASKED,
    ]


class Reader(nn.Module):
    """Token ids (B, 32) -> logits for all questions, side by side (B, 63), and the form of the individual (B, 3)."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder: CLIPTextModel = make_text_encoder(tokenizer)
        self.answer = nn.Linear(TEXT_WIDTH, sum(QUESTIONS.values()))
        self.form = nn.Linear(TEXT_WIDTH, 3)
        self.end = tokenizer.eos_token_id

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        after = (ids == self.end).unsqueeze(-1)
        summary = (self.text_encoder(ids)[0] * after).sum(1) / after.sum(1)
        return self.answer(summary), self.form(summary)


def train_reader(tokenizer: CLIPTokenizer, scenes: int, budget: Budget, folder: Path, device: str) -> CLIPTextModel:
    """Learns on captions of the first `scenes` scenes of the stream and returns the text encoder."""
    torch.manual_seed(6)
    reader = Reader(tokenizer).to(device)
    stream = [training_scene(i) for i in range(scenes)]

    def draw(step: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = Random(f"reading {step}")
        chosen = [rng.choice(stream) for _ in range(budget.batch)]
        texts = [caption(scene, rng) for scene in chosen]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        forms = torch.tensor([scene.look.form for scene in chosen])
        return ids.to(device), torch.tensor([answers(scene) for scene in chosen]).to(device), forms.to(device)

    def loss_of(step: int) -> Tensor:
        ids, right, forms = draw(step)
        with torch.autocast(device, torch.bfloat16):
            logits, form = reader(ids)
        asked = zip(logits.float().split(list(QUESTIONS.values()), 1), right.T, strict=True)
        return sum((F.cross_entropy(*one) for one in asked), F.mse_loss(form.float(), forms))

    def measure(average: nn.Module) -> dict[str, float]:
        ids, right, _ = draw(-1)
        with torch.inference_mode():
            parts = average(ids)[0].split(list(QUESTIONS.values()), 1)
        hits = {
            name: part.argmax(1) == right[:, i] for i, (name, part) in enumerate(zip(QUESTIONS, parts, strict=True))
        }
        return {name: hit[right[:, i] >= 0].float().mean().item() for i, (name, hit) in enumerate(hits.items())}

    Fit("reader", reader, budget, folder).run(loss_of, measure)
    return reader.text_encoder
