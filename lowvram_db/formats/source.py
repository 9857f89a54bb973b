"""Where a model comes from: a local folder in diffusers' format, a single file, or a hub id, downloaded once."""

import contextlib
import re
from dataclasses import asdict
from pathlib import Path

from lowvram_db.errors import UserError
from lowvram_db.formats.known import known_configs
from lowvram_db.reading import AS_IT_IS, Reading

# No more than the hub's library takes, which raises for the rest.
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9](?:[\w.-]*\w)?/[A-Za-z0-9](?:[\w.-]{0,94}\w)?")

# What a text-to-image pipeline is made of; not the safety checker, the single-file copies or the half-precision twins.
_WANTED_FILES = [
    "model_index.json",
    "scheduler/*.json",
    "tokenizer*/*",
    *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")),
    *(f"{part}/diffusion_pytorch_model*.safetensors*" for part in ("unet", "vae")),
    *(f"{part}/model*.safetensors*" for part in ("text_encoder", "text_encoder_2")),
]
_TEXT_FILES = [pattern for pattern in _WANTED_FILES if pattern.startswith(("tokenizer", "text_encoder"))]
_CONFIG_FILES = [pattern for pattern in _WANTED_FILES if pattern.endswith(".json")]
_UNWANTED_FILES = ["*.fp16.*", "*non_ema*"]


def find_model(name: str, revision: str | None = None, reading: Reading = AS_IT_IS) -> Path:
    """The folder of the model called `name`; of one that is a single file, a folder that stands for it.

    Raises UserError when there is none or it cannot be downloaded, and for a file that is no model to train.
    """
    if _is_file(name, revision, reading):
        from lowvram_db.formats.single_file import as_folder  # heavy, and only wanted here

        return as_folder(_local(name), reading)
    return _find(name, revision, _WANTED_FILES)


def find_texts(name: str, reading: Reading = AS_IT_IS) -> Path:
    """The folder of a model that is no single file, in which its tokenizers and text encoders are: no more of a hub id
    is downloaded. Raises UserError as find_model does."""
    _is_file(name, None, reading)
    return _find(name, None, _TEXT_FILES)


def find_configs(name: str, revision: str | None = None, reading: Reading = AS_IT_IS) -> Path:
    """A folder with the config files of the model called `name`; those of well-known models come with the package.

    Raises UserError as find_model does.
    """
    if _is_file(name, revision, reading):
        from lowvram_db.formats.single_file import as_configs

        return as_configs(_local(name), reading)
    known = known_configs(name) if revision is None and not _local(name).exists() else None
    return known or _find(name, revision, _CONFIG_FILES)


def at_hand(name: str) -> Path | None:
    """The file or folder of a model that is on this machine, the hub's cache included; None for what is not."""
    if (place := _local(name)).exists():
        return place
    if not _HUB_ID.fullmatch(name):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError):
        return Path(snapshot_download(name, local_files_only=True))
    return None


def _is_file(name: str, revision: str | None, reading: Reading) -> bool:
    """Whether a model is a single file. Raises UserError where what is said of it means nothing to what it is."""
    if _local(name).is_file():
        if revision is not None:
            raise UserError(f"model.revision: {name} is a local file, which has no revisions; remove the key")
        return True
    for key, value in asdict(reading).items():
        if value and key != "prediction_type":  # which is for every model
            raise UserError(f"model.{key}: {name} is no single file; a folder says it itself: remove the key")
    return False


def _local(name: str) -> Path:
    with contextlib.suppress(RuntimeError):  # ~ of a user that there is not
        return Path(name).expanduser()
    return Path(name)


def _find(name: str, revision: str | None, files: list[str]) -> Path:
    folder = _local(name)
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"model.revision: {name} is a local folder, which has no revisions; remove the key")
        return folder
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"model.name: no folder or file {folder.absolute()}, and {name!r} is not a hub id (owner/name)")
    return _download(name, revision, files)


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # takes most of a second, and only wanted here
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=_UNWANTED_FILES))
    except GatedRepoError as error:
        raise UserError(f"model.name: {name} wants its licence accepted first: log in with `hf auth login`") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"model.name: the hub has no public {name}"
            + (f" at revision {revision}" if revision else "")
            + "; check the spelling, or log in with `hf auth login` if it is private"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"model.name: {name} is not on this machine ({_local(name).absolute()} is no folder) and the hub cannot be "
            "reached; check the network, or give a local folder"
        ) from error
