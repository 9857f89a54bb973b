"""CLIP's own vocabulary, where it is at hand, and the demo's, whose rare words are known."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from lowvram_db.formats.tokenizer import read_vocabulary
from lowvram_db.formats.tokens import Tokens, read_tokens


@pytest.fixture(scope="module")
def clip(clip_vocabulary):
    """CLIP's vocabulary, with an embedding that means nothing."""
    vocabulary = read_vocabulary(clip_vocabulary)
    table = np.random.default_rng(0).random((len(vocabulary.tokens), 16), dtype=np.float32) - 0.5
    return [Tokens("text_encoder", vocabulary, table)]


@pytest.fixture(scope="module")
def demo(request):
    return read_tokens(str(request.config.rootpath / "lowvram_db" / "demo" / "base"))


@pytest.fixture
def clip_folder(clip_vocabulary, clip, tmp_path):
    """A model folder of which nothing is there but what is asked for."""
    (tmp_path / "clip" / "text_encoder").mkdir(parents=True)
    (tmp_path / "clip" / "tokenizer").symlink_to(clip_vocabulary)
    save_file(
        {"text_model.embeddings.token_embedding.weight": clip[0].embedding},
        tmp_path / "clip" / "text_encoder" / "model.safetensors",
    )
    return tmp_path / "clip"
