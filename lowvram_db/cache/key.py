"""What makes a cached entry valid: the content that went in and the bytes of the encoder it went through.

A key is a digest of exactly that, so an entry is either right or not found; nothing in the cache can go stale.
"""

import hashlib
from collections.abc import Mapping

from PIL import Image
from torch import Tensor

from lowvram_db.files.writer import slices_of, values_of
from lowvram_db.framing import View

FORMAT_VERSION = 3  # of entries and files; another one's folder lies beside and is not looked into


def pixels_digest(photo: Image.Image) -> str:
    """SHA-256 of a decoded photo: its size and its 8-bit RGB values."""
    return hashlib.sha256(f"{photo.width}x{photo.height}:".encode() + photo.tobytes()).hexdigest()


def encoder_digest(files: list[tuple[str, str]]) -> str:
    """SHA-256 of an encoder, from the names and SHA-256 digests of its files, in order."""
    return _digest("encoder", *(part for file in files for part in file))


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights that are in no file: their names, dtypes, shapes and bytes, wherever they are."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        for piece in slices_of(weight):
            digest.update(values_of(piece.cpu().contiguous()))
    return digest.hexdigest()


def latent_key(pixels: str, view: View, encoder: str, dtype: str, tiled: int = 0) -> str:
    """Key of the moments of one view of a photo.

    pixels, encoder: digests as above. dtype: the encoder's arithmetic, for example "float16". tiled: 0 where the photo
    went through the VAE whole, else how often families/tiles.py was asked: tiles change what it says near their edges.
    """
    way = f"tiled {tiled}" if tiled > 1 else "tiled" if tiled else "whole"
    return _digest("latent", pixels, str(view), encoder, dtype, way)


def text_key(prompt: str, encoder: str, dtype: str) -> str:
    """Key of one prompt's conditioning under one tokenizer and text encoder."""
    return _digest("text", prompt, encoder, dtype)


def _digest(*parts: str) -> str:
    digest = hashlib.sha256(f"lowvram-db cache {FORMAT_VERSION}".encode())
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
