"""Tokens as transformers reads them, and the very table that the text encoder has; of folders and of single files."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from lowvram_db.demo.miniature import write_sdxl
from lowvram_db.errors import UserError
from lowvram_db.formats.tokenizer import read_vocabulary
from lowvram_db.formats.tokens import Tokens, read_tokens
from lowvram_db.reading import Reading

TABLE = "text_model.embeddings.token_embedding.weight"


@pytest.fixture(scope="module")
def demo(request):
    return request.config.rootpath / "lowvram_db" / "demo" / "base"


@pytest.fixture(scope="module", params=["CLIP's", "the demo's"])
def tokenizer(request, demo):
    return request.getfixturevalue("clip_vocabulary") if request.param == "CLIP's" else demo / "tokenizer"


@pytest.fixture(scope="module")
def readers(tokenizer):
    """Ours and transformers'."""
    vocabulary = read_vocabulary(tokenizer)
    tokens = Tokens("text_encoder", vocabulary, np.zeros((len(vocabulary.tokens), 1), np.float32))
    return tokens, CLIPTokenizer.from_pretrained(tokenizer)


TEXTS = [
    st.text(max_size=30),
    st.text("pkblz 'ts12éß💟\u200d\n", max_size=30),
    st.sampled_from(["a <|endoftext|> b", "e\u0301t\u00e9"]),
]


@given(text=st.one_of(TEXTS))
def test_texts_are_read_as_transformers_reads_them(readers, text):
    ours, theirs = readers
    assert ours.read(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_table_of_a_folder_is_its_text_encoders(demo, tmp_path, dtype):
    shutil.copytree(demo / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "text_encoder").mkdir()
    weights = {name: tensor.to(dtype) for name, tensor in load_file(demo / "text_encoder/model.safetensors").items()}
    save_file(weights, tmp_path / "text_encoder" / "model.safetensors")
    (tokens,) = read_tokens(str(tmp_path))
    assert torch.equal(torch.from_numpy(tokens.embedding), weights[TABLE.removeprefix("text_model.")].float())


def test_every_text_encoder_of_a_model_is_read(tmp_path):
    write_sdxl(tmp_path / "xl")
    assert [tokens.part for tokens in read_tokens(str(tmp_path / "xl"))] == ["text_encoder", "text_encoder_2"]


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_single_file_has_the_same_as_its_folder(write_file, write_folder, letters, kind, name):
    file, folder = write_file(kind, name), write_folder(kind)
    found = read_tokens(str(file), Reading(tokenizer=str(letters)))
    wanted = read_tokens(str(folder))
    assert [tokens.part for tokens in found] == [tokens.part for tokens in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.vocabulary == other.vocabulary and np.array_equal(one.embedding, other.embedding)


def test_of_a_model_on_the_hub_no_more_is_downloaded(demo, tmp_path, monkeypatch):
    def download(name, revision, allow_patterns, ignore_patterns):
        files = [path.relative_to(demo).as_posix() for path in demo.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            shutil.copy(demo / file, tmp_path / file)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found, wanted = read_tokens("someone/model"), read_tokens(str(demo))
    assert found[0].vocabulary == wanted[0].vocabulary and np.array_equal(found[0].embedding, wanted[0].embedding)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "text_encoder"}


def test_what_takes_seconds_is_not_imported(demo):
    script = (
        "import sys; from lowvram_db.formats.tokens import read_tokens; "
        f"read_tokens({str(demo)!r}); sys.exit(bool({{'torch', 'transformers', 'huggingface_hub'}} & {{*sys.modules}}))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_what_is_wrong_is_named(demo, tmp_path):
    with pytest.raises(UserError, match="has no text encoder of CLIP's kind"):
        read_tokens(str(tmp_path))
    shutil.copytree(demo / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "text_encoder").mkdir()
    file = tmp_path / "text_encoder" / "model.safetensors"
    for table, words in (
        (torch.zeros(700, 8), "has 755 tokens, text_encoder knows 700"),
        (torch.full((755, 8), torch.nan), "numbers that are not finite"),
        (torch.zeros(755, 8, dtype=torch.int8), "which is no table of numbers"),
    ):
        save_file({TABLE: table}, file)
        with pytest.raises(UserError, match=words):
            read_tokens(str(tmp_path))
