"""Whose folder is this? A cache is made only where there is nothing, and used only where a tag says that it is ours."""

import re
from pathlib import Path

from lowvram_db.atomic import replacing_file
from lowvram_db.cache.key import FORMAT_VERSION
from lowvram_db.errors import UserError

CATALOGUE = "files.jsonl"
TAG = "CACHEDIR.TAG"
# The first line is the standard's, https://bford.info/cachedir/
_TAG_TEXT = "Signature: 8a477f597d28d172789f06886e5d4b4c\n# Latents and text embeddings, made by lowvram-db.\n"
_VERSION_1_FILE = re.compile(r"\.?[0-9a-f]{64}\.safetensors(\.partial-\w+)?")
STORE_FILES = rf"[0-9a-f]{{32}}\.safetensors|{re.escape(CATALOGUE)}"  # names, a regular expression
_STORE_FILE = re.compile(rf"\.?({STORE_FILES})(\.partial-\w+|\.lock)?")


def home(folder: Path) -> Path:
    """Where in a cache's folder this format version's files are; other versions' lie beside."""
    return folder / f"v{FORMAT_VERSION}"


def claim(folder: Path, writable: bool) -> None:
    """Make a cache where there is nothing, if it is to be `writable`; raise UserError for what is no cache of ours."""
    try:
        if folder.exists() and not (folder.is_dir() and _is_ours(folder)):
            raise UserError(f"{folder}: is not a cache of lowvram-db, and not empty; give another folder as the cache")
        if writable:
            home(folder).mkdir(parents=True, exist_ok=True)
            if not is_tagged(folder):
                with replacing_file(folder / TAG) as temporary:
                    temporary.write_text(_TAG_TEXT, encoding="utf-8", newline="\n")
        elif not folder.exists():
            raise UserError(f"{folder}: does not exist")
    except OSError as error:
        raise UserError(f"{folder}: cannot be used as a cache ({error}); choose another cache.dir") from error


def is_tagged(folder: Path) -> bool:
    """Whether the folder says that it is ours."""
    try:
        return (folder / TAG).read_bytes() == _TAG_TEXT.encode()
    except OSError:
        return False


def _is_ours(folder: Path) -> bool:
    """Whether a folder is empty, or says that it is ours, or, where the tag is lost, holds nothing else."""
    found = [path for path in folder.iterdir() if not path.name.startswith(f".{TAG}.partial-")]
    parts = [path for path in found if path.name != TAG]
    return not found or is_tagged(folder) or (bool(parts) and all(map(_is_part, parts)))


def _is_part(path: Path) -> bool:
    if re.fullmatch(r"v\d+", path.name) and path.is_dir():
        return all(_STORE_FILE.fullmatch(file.name) for file in path.iterdir())
    return bool(_VERSION_1_FILE.fullmatch(path.name))
