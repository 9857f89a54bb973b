"""A UNet of diffusers, trained on cached latents by a loop of one's own: open, precompute, iterate, verify.

    python docs/cache_example.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --photos photos --cache cache

Of lowvram-db it uses the cache alone. VAE and text encoder are gone from memory before the UNet is loaded; every step
draws fresh latents, and one of four crops of each photo.
"""

import argparse
import random
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from lowvram_db.cache import Cached, Framing, Store, precompute
from lowvram_db.families import open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a Stable Diffusion 1.x")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--prompt", default="a photo of a pkblz dog")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = open_model(options.model)
    with Store(options.cache) as store:
        cached = precompute(
            family,
            store,
            device,
            framing=Framing(options.resolution, crop="buckets", variants=4, multiple=family.side_multiple),
            photos=sorted(options.photos.iterdir()),
            prompts=[options.prompt],
        )
        train(family.folder, cached, options.prompt, options.steps, device)
        damage = store.verify()
    print(f"{len(cached.photos)} photos cached; {damage or 'whole'}")


def train(model: Path, cached: Cached, prompt: str, steps: int, device: torch.device, batch: int = 2) -> None:
    """The usual loop. All rows of a batch have one size, so a step begins with the choice of one."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").to(device).train()
    schedule = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-6)
    text = cached.conditioning([prompt] * batch)["text"].to(device)
    chance = random.Random(0)
    for step in range(steps):
        size = chance.choice([frame.size for frame in cached.photos.values()])
        fitting = [frame for frame in cached.photos.values() if frame.size == size]
        keys = [chance.choice(chance.choice(fitting).keys) for _ in range(batch)]

        mean, logvar = (part.to(device) for part in cached.moments(keys))
        latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(schedule.config.num_train_timesteps, (batch,), device=device)
        prediction = unet(schedule.add_noise(latents, noise, timesteps), timesteps, text).sample
        loss = torch.nn.functional.mse_loss(prediction, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: {size[0]}x{size[1]}, loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
