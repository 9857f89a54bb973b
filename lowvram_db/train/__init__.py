"""From cached latents to a trained denoiser: batches, objective, loop, checkpoints."""
