"""Hold a run to its share of the card's memory."""

import torch

from lowvram_db.memory.overheads import CONTEXT
from lowvram_db.memory.size import gib, parse_size
from lowvram_db.progress import say


def free_bytes(device: torch.device) -> int | None:
    """What a new process could take of the card: what is free, and this one's own context. None without a card."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return min(total, free + CONTEXT + torch.cuda.memory_reserved(device))


def lacking(vram: str, device: torch.device) -> str:
    """What is wrong with a `memory.vram` that the card here cannot give; empty where all is well."""
    free = free_bytes(device)
    if free is None or parse_size(vram) <= free:
        return ""
    total = torch.cuda.mem_get_info(device)[1]
    others = f", {gib(total - free)} of it in use by others" if free < total else ""
    return f"memory.vram: {vram} is more than the card has ({gib(total)}{others})"


def budget_for(vram: str | None, device: torch.device) -> int | None:
    """`memory.vram` in bytes, at most what the card has free, which is also the default. None: no card and none asked
    for. Says so where the card has less than was asked for."""
    free = free_bytes(device)
    if vram is None or free is None:
        return free if vram is None else parse_size(vram)
    if problem := lacking(vram, device):
        say(f"{problem}; going by {gib(free)}")
    return min(parse_size(vram), free)


def crowd(device: torch.device) -> str:
    """What other programs hold of the card, in words for whoever runs out of memory; empty where that is little."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - CONTEXT - torch.cuda.memory_reserved(device)
    return f"; other programs hold {gib(others)} of the card now" if others > total // 16 else ""


def cap(budget: int | None, device: torch.device) -> None:
    """Let the allocator refuse what would go over the budget, instead of taking it from others or spilling."""
    if budget is not None and device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        # By number: this one takes no device without an index.
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, budget - CONTEXT) / total), device.index)
