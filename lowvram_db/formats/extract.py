"""A LoRA out of a whole model that was trained: the directions in which each layer has changed most."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowvram_db.errors import UserError
from lowvram_db.formats.lora_file import Layer, Lora, LowRank, plain
from lowvram_db.formats.stored import Model, same

SHARES = (0.90, 0.95, 0.99)  # of the energy, whose rank is told
# Kinds of layers, by their names in a UNet or a text encoder; the first that has a part of it.
_GROUPS = {
    "attention": r"\.(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)$",
    "mlp": r"\.ff\.net\.|\.mlp\.",
    "projections": r"\.proj_(in|out)$",
    "time and size": r"time_emb|add_embedding",
    "convolutions": r"",
}


@dataclass
class Group:
    """What layers of one kind have changed by, taken together."""

    kept: float = 0.0  # energy, the sum of squares, that is in the LoRA
    layers: int = 0
    spectrum: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))  # squares, by their number

    @property
    def energy(self) -> float:
        return float(self.spectrum.sum())

    def rank_for(self, share: float) -> int:
        """The least rank that keeps so much of the energy."""
        reached = self.spectrum.cumsum(0) >= share * self.spectrum.sum()
        return int(reached.int().argmax()) + 1

    def add(self, squares: Tensor, rank: int) -> None:
        longer, shorter = sorted((self.spectrum, squares), key=len, reverse=True)
        self.spectrum = longer.clone()
        self.spectrum[: len(shorter)] += shorter
        self.kept, self.layers = self.kept + float(squares[:rank].sum()), self.layers + 1


@dataclass
class Extracted:
    """A LoRA, and what of the change is in it."""

    lora: Lora = field(default_factory=dict)
    groups: dict[tuple[str, str], Group] = field(default_factory=dict)  # by part and kind
    left: dict[str, float] = field(default_factory=dict)  # energy of what no LoRA has, by part

    def lines(self) -> Iterator[str]:
        """For people."""
        for (part, kind), group in self.groups.items():
            ranks = ", ".join(f"{share:.0%} {group.rank_for(share)}" for share in SHARES)
            yield f"{part}, {kind}: {group.kept / group.energy:.1%} kept of {group.layers} layers; rank for {ranks}"
        for part, energy in self.left.items():
            whole = energy + sum(group.energy for (of, _), group in self.groups.items() if of == part)
            yield f"{part}: {energy / whole:.1%} of its change is in norms, biases and embeddings, which no LoRA has"


@torch.no_grad()
def extract(base: Model, tuned: Model, rank: int, device: torch.device) -> Extracted:
    """The best change of that rank for every layer that a file can name (Eckart and Young 1936), float32 on the CPU,
    and with a layer's full rank where that is less. On `device`, one layer at a time.

    Raises UserError where the two are not of one architecture, or the same.
    """
    found = Extracted()
    for part in [part for part in tuned.parts if part != "vae"]:
        before, after = base.parts.get(part, {}), tuned.parts[part]
        if {name: one.shape for name, one in before.items()} != {name: one.shape for name, one in after.items()}:
            raise UserError(f"--base: its {part} is of another shape; name the model that was trained")
        if part != "unet" and same(before, after):
            continue
        for name, stored in after.items():
            change = stored.read().to(device, torch.float32) - before[name].read().to(device, torch.float32)
            if not change.isfinite().all():
                raise UserError(f"{part}: {name} holds numbers that are not finite; the model is damaged")
            _take(found, (part, plain(name).removesuffix(".weight")), name, change, rank)
    if not found.lora:
        raise UserError("--base: is the same as the model; name the one that it was trained from")
    return found


def _take(found: Extracted, layer: Layer, name: str, change: Tensor, rank: int) -> None:
    part, own = layer
    if not change.any():
        return
    if not name.endswith(".weight") or change.dim() not in (2, 4) or (part != "unet" and ".layers." not in own):
        found.left[part] = found.left.get(part, 0.0) + float(change.double().square().sum())
        return
    up, values, down = torch.linalg.svd(change.flatten(1), full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    found.lora[layer] = LowRank(
        (root[:, None] * down[:kept]).reshape(kept, *change.shape[1:]).cpu(),
        (up[:, :kept] * root).reshape(len(up), kept, *[1] * (change.dim() - 2)).cpu(),
        float(kept),
    )
    kind = next(kind for kind, pattern in _GROUPS.items() if re.search(pattern, f".{own}"))
    found.groups.setdefault((part, kind), Group()).add(values.double().square().cpu(), kept)
