import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_db.kernels import bits

WORD = st.integers(0, 2**32 - 1)

# Known answers of Philox 4x32-10, published with Random123 (kat_vectors): counter, key, result.
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
}


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(name):
    (c0, c1, c2, c3), (k0, k1), answer = KNOWN_ANSWERS[name]
    words = bits.philox(k0 | k1 << 32, torch.tensor([c0]), c1, c2, c3)
    assert tuple(int(word) for word in words) == answer


@settings(max_examples=25)
@given(seed=st.integers(0, 2**63 - 1), counters=st.tuples(WORD, WORD, WORD, WORD))
def test_philox_equals_plain_integers(seed, counters):
    """Python's own unbounded integers know no overflow: the int64 products must wrap to the same words."""
    x, k = list(counters), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        low, high = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(high >> 32) ^ x[1] ^ k[0], high & 0xFFFFFFFF, (low >> 32) ^ x[3] ^ k[1], low & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    c0, *rest = counters
    assert [int(word) for word in bits.philox(seed, torch.tensor([c0]), *rest)] == x


def test_normal_is_standard_normal():
    draws = bits.normal((400, 1000), 7, step=3, sample=1, stream=2).double()
    count = draws.numel()
    assert abs(draws.mean()) < 4 / math.sqrt(count)
    assert abs(draws.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((draws**4).mean() - 3) < 4 * math.sqrt(96 / count)
    within = (draws.abs() < 1).double().mean()
    assert abs(within - 0.682689) < 4 * math.sqrt(0.2166 / count)


def test_every_part_of_the_address_matters():
    address = {"step": 5, "sample": 6, "stream": 7}
    first = bits.normal((64,), 4, **address)
    assert torch.equal(first, bits.normal((64,), 4, **address))
    others = [bits.normal((64,), 5, **address)]
    others += [bits.normal((64,), 4, **{**address, key: address[key] + 1}) for key in address]
    others += [bits.normal((64,), 4 + 2**32, **address)]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.5  # 4 sigma of 64 independent pairs


def test_normal_counts_elements_not_shapes():
    flat = bits.normal((24,), 0, step=0, sample=0, stream=0)
    assert torch.equal(bits.normal((2, 3, 4), 0, step=0, sample=0, stream=0).flatten(), flat)


@settings(max_examples=50)
@given(high=st.integers(1, 2**31), seed=st.integers(0, 2**63 - 1), step=WORD)
def test_integer_stays_below(high, seed, step):
    assert 0 <= bits.integer(high, seed, step=step, sample=0, stream=0) < high


def test_integer_is_uniform():
    counts = torch.bincount(
        torch.tensor([bits.integer(10, 1, step=step, sample=0, stream=0) for step in range(5000)]), minlength=10
    )
    chi_square = ((counts - 500.0) ** 2 / 500).sum()
    assert chi_square < 33.7  # 1 in 10,000 for nine degrees of freedom; the draws are fixed, so this cannot flake


@settings(max_examples=25)
@given(length=st.integers(1, 200), step=WORD)
def test_permutation_holds_everything_once(length, step):
    assert sorted(bits.permutation(length, 3, step=step, stream=4)) == list(range(length))
