"""Files that only stand where the content should be, as a download or a checkout leaves them."""

from pathlib import Path

from lowvram_db.errors import UserError

_STAND_INS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the content; run `git lfs pull`, or download it again",
    b"<!doctype html": "is a web page, not the content; download it again",
    b"<html": "is a web page, not the content; download it again",
}


def refuse_stand_in(file: Path) -> None:
    """Raises UserError for a file that only stands where the content should be."""
    try:
        with file.open("rb") as opened:
            head = opened.read(64).lstrip().lower()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if not head:
        raise UserError(f"{file}: is empty; download it again")
    for beginning, meaning in _STAND_INS.items():
        if head.startswith(beginning):
            raise UserError(f"{file}: {meaning}")
