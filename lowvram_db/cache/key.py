"""What makes a cached entry valid: the content that went in and the bytes of the encoder it went through.

A key is a digest of exactly that, so an entry is either right or not found; nothing in the cache can go stale.
"""

import hashlib
from pathlib import Path

from torch import Tensor

FORMAT_VERSION = 1


def files_digest(files: list[Path]) -> str:
    """SHA-256 over the names and contents of an encoder's files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()


def latent_key(pixels: Tensor, vae_digest: str) -> str:
    """Key of one photo's moments: its pixels (float32 [3, H, W], after resizing and cropping) under one VAE."""
    shape = "x".join(map(str, pixels.shape))
    return _digest("latent", vae_digest, shape, pixels.contiguous().numpy().tobytes())


def text_key(prompt: str, text_digest: str) -> str:
    """Key of one prompt's conditioning under one tokenizer and text encoder."""
    return _digest("text", text_digest, prompt)


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256(f"lowvram-db cache {FORMAT_VERSION}".encode())
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
