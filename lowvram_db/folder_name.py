"""Names of folders that every system takes, whichever of them the run is moved to."""

import re

_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]')  # the last: bytes of a name that were no text
_DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\.|$)", re.IGNORECASE)  # Windows's, also with an ending
_LONGEST = 200  # bytes: ext4, NTFS and APFS have 255, and a file that is just being written has a longer name


def problem(name: str) -> str | None:
    """Why `name` can be no folder's name on Linux, macOS or Windows, in words that follow it; None where it can."""
    if not name.strip(" ."):
        return "is no name"
    if found := _FORBIDDEN.search(name):
        return f"has {found[0]!r} in it, which a folder's name cannot have everywhere"
    if name[-1] in " .":
        return "ends in a dot or a space, which Windows drops from a folder's name"
    if _DEVICE.match(name):
        return "is the name of a device on Windows"
    if len(name.encode()) > _LONGEST:
        return f"is longer than {_LONGEST} bytes"
    return None


def from_any(name: str) -> str:
    """A name as near to this one as a folder's can be."""
    taken = _FORBIDDEN.sub("-", name).encode()[:_LONGEST].decode(errors="ignore").rstrip(" .")
    if not taken.strip(" ."):
        return "run"
    return "run-" + taken[: _LONGEST // 4 - 1] if _DEVICE.match(taken) else taken
