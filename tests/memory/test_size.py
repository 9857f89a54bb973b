import pytest

from lowvram_db.memory.size import parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("12GiB", 12 * 2**30),
        ("4608 MiB", 4608 * 2**20),
        ("11.5 GB", 11_500_000_000),
        (" 8gib ", 8 * 2**30),
        ("12,5GiB", 25 * 2**29),
        ("12G", 12 * 2**30),
        ("4608m", 4608 * 2**20),
    ],
)
def test_sizes(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["12", "-3GiB", "0GiB", "GiB", "12 GiB or so", "1e3GiB", "", "infGiB", "12TB", "1,024MiB", "9" * 400 + "GB"]
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size; write a number and a unit"):
        parse_size(text)
