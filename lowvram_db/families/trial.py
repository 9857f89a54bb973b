"""A model tried out before any of its weights are there: its networks are made from their config files and called once,
on tensors without memory, so that what cannot be trained is refused at once and by the file that says so."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowvram_db.errors import UserError
from lowvram_db.families.blank import Blank
from lowvram_db.families.conditioning import Conditioning, collated
from lowvram_db.families.configs import NOT_BUILT
from lowvram_db.files.foreign import naming
from lowvram_db.formats.known import is_packaged
from lowvram_db.framing import View

_passed: set[tuple[bytes, ...]] = set()  # config files that stood the trial; a run opens its model more than once


def try_out(family: Blank) -> None:
    """Raises UserError where a network cannot be made, called or trained, or two do not fit together. Config files that
    come with the package have stood it before they came."""
    if is_packaged(family.folder):
        return
    configs = tuple(file.read_bytes() for file in sorted(family.folder.glob("*/config.json")))
    if configs not in _passed:
        _try_networks(family)
        _passed.add(configs)


def _try_networks(family: Blank) -> None:
    side = family.side_multiple // family.latent_side
    latents = (1, family.latent_channels, side, side)
    view = View.of((family.side_multiple,) * 2, (family.side_multiple,) * 2)
    with torch.device("meta"), torch.enable_grad():
        with naming(family.folder / "text_encoder" / "config.json", NOT_BUILT):
            text = family.encode_prompts(family.load_text_encoders(), [""])
        text = {name: tensor.detach().requires_grad_() for name, tensor in text.items()}
        with naming(family.folder / "vae" / "config.json", NOT_BUILT):
            _try_vae(family.load_vae(), (1, 3, family.side_multiple, family.side_multiple), latents)
        with naming(family.folder / "unet" / "config.json", NOT_BUILT):
            _try_denoiser(family, latents, text, collated([family.view_conditioning(view)]))


def _try_vae(vae: Any, picture: tuple[int, ...], latents: tuple[int, ...]) -> None:
    mean = vae.encode(torch.empty(picture)).latent_dist.mean
    decoded = vae.decode(torch.empty(latents)).sample
    if mean.shape != latents or decoded.shape != picture:
        raise ValueError(f"a picture {picture} becomes {tuple(mean.shape)}, and {latents} {tuple(decoded.shape)}")


def _try_denoiser(family: Blank, latents: tuple[int, ...], text: Conditioning, sizes: Conditioning) -> None:
    denoiser: Any = family.load_denoiser().requires_grad_()
    denoiser.enable_gradient_checkpointing()
    timesteps = torch.zeros(1, dtype=torch.int64)
    prediction = family.denoise(denoiser, torch.empty(latents), timesteps, text | sizes)
    if prediction.shape != latents:
        raise ValueError(f"{latents} becomes {tuple(prediction.shape)}")
    reached = set(map(id, _leaves(prediction)))
    idle = [name for name, parameter in denoiser.named_parameters() if id(parameter) not in reached]
    path = family.folder / family.denoiser_part / "config.json"
    if idle:
        raise UserError(f"{path}: {idle[0]} of this UNet has no part in what it predicts, and would not be trained")
    if not reached.issuperset(map(id, text.values())):
        raise UserError(f"{path}: this UNet does not listen to the prompt (it has no cross attention)")


def _leaves(result: Tensor) -> Iterator[Tensor]:
    """The tensors that a result has been computed from, as backward would come to them."""
    waiting: list[Any] = [result.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
