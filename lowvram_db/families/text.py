"""What the text encoders say of prompts, all of them in memory for as long as that takes and no longer."""

from collections.abc import Iterator, Sequence

import torch

from lowvram_db.errors import UserError
from lowvram_db.families.base import Family
from lowvram_db.families.conditioning import Conditioning
from lowvram_db.memory.device import release_memory


@torch.no_grad()
def encoded(
    family: Family, prompts: Sequence[str], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Conditioning]]:
    """Every prompt and what the denoiser is told of it: float32, without a row's dimension, on the device.

    dtype: of the encoders; a prompt that overflows in it is encoded in float32, at the end. Raises UserError for one
    that is no numbers in float32 either.
    """
    left = list(prompts)
    for precision in dict.fromkeys((dtype, torch.float32)):
        if left:
            encoders = {part: encoder.to(device) for part, encoder in family.load_text_encoders(precision).items()}
            overflowed = []
            for prompt in left:
                batch = family.encode_prompts(encoders, [prompt])
                text = {name: tensor[0].float() for name, tensor in batch.items()}
                if all(tensor.isfinite().all() for tensor in text.values()):
                    yield prompt, text
                else:
                    overflowed.append(prompt)
            del encoders
            release_memory()
            left = overflowed
    if left:
        raise UserError(f"{family.folder}: its text encoder makes no finite numbers of {left[0]!r}; replace it")
