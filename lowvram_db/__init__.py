"""Full DreamBooth (every weight of the denoiser, true Adam) on the card people own."""

__version__ = "0.1.0"
