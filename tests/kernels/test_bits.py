import math

import pytest
import torch
import triton
import triton.language as tl
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
    assert list(bits.philox(seed, c0, *rest)) == x


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
@given(high=st.integers(1, 2**31), seed=st.integers(0, 2**63 - 1), address=st.tuples(WORD, WORD, WORD))
def test_integer_is_the_address_first_word_as_a_share_of_what_is_asked_for(high, seed, address):
    word = bits.philox(seed, torch.zeros(1, dtype=torch.int64), *address)[0].item()
    step, sample, stream = address
    drawn = bits.integer(high, seed, step=step, sample=sample, stream=stream)
    assert drawn == word * high // 2**32 < high


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


def floats_near(exponent, count, seed=0):
    """Random float32 of one binary exponent, both signs."""
    generator = torch.Generator().manual_seed(seed)
    fraction = 1 + torch.rand(count, generator=generator)
    return fraction * 2.0**exponent * (torch.randint(0, 2, (count,), generator=generator) * 2 - 1)


def random_lanes(count, **address):
    return bits.lanes(torch.arange(-(-count // 8)), 1, **{"step": 0, "sample": 0, "stream": 0} | address).flatten()[
        :count
    ]


def test_lanes_are_uniform_and_their_bits_independent():
    lanes = random_lanes(2**20)
    assert lanes.min() >= 0 and lanes.max() < 2**16
    counts = torch.bincount(lanes >> 8, minlength=256)
    assert ((counts - 4096.0) ** 2 / 4096).sum() < 350  # 1 in 10,000 for 255 degrees of freedom is 345; fixed draws
    ones = torch.stack([(lanes >> bit) & 1 for bit in range(16)]).double()
    correlation = torch.corrcoef(ones) - torch.eye(16)
    assert correlation.abs().max() < 5 / 2**10
    neighbours = torch.corrcoef(lanes.view(-1, 8).T.double()) - torch.eye(8)
    assert neighbours.abs().max() < 5 / 2**8.5


def test_other_bits_are_a_permutation_apart():
    every = torch.arange(2**16, dtype=torch.int32)
    other = bits.other_bits(every)
    assert torch.equal(other.sort().values, every)
    assert abs(torch.corrcoef(torch.stack([every, other]).double())[0, 1]) < 0.02


def test_stochastic_rounding_to_bf16_is_unbiased_at_every_exponent():
    """10^6 draws each, from the subnormals up: up or down by no more than a place, and as often up as the part that is
    cut says, within four standard deviations of what the draws allow."""
    count, random = 10**6, random_lanes(10**6)
    for exponent in range(-127, 128):
        generator = torch.Generator().manual_seed(exponent + 127)
        fraction = torch.randint(0, 2**23, (count,), generator=generator, dtype=torch.int32)
        sign = torch.randint(0, 2, (count,), generator=generator, dtype=torch.int32) << 31
        pattern = sign | ((exponent + 127) << 23) | fraction
        cut = (pattern & 0xFFFF).long()
        rounded = bits.round_bf16(pattern.view(torch.float32), random).view(torch.int16).long() & 0xFFFF
        up = rounded - ((pattern >> 16).long() & 0xFFFF)
        assert ((up == 0) | (up == 1)).all(), exponent
        deviation = math.sqrt((cut * (2**16 - cut)).sum().item())
        error = up * 2**16 - cut
        assert abs(error.sum().item()) < 4 * deviation, exponent
        assert abs((error * sign.sign()).sum().item()) < 4 * deviation, exponent


@pytest.mark.parametrize("exponent", range(-26, 16))
def test_stochastic_rounding_to_fp16_is_unbiased(exponent):
    x = floats_near(exponent, 10**6).clamp(-65000, 65000)
    rounded = bits.round_fp16(x, random_lanes(10**6)).double()
    place = 2.0 ** max(exponent - 10, -24)
    error = (rounded - x.double()) / place
    assert error.abs().max() < 1
    assert abs(error.mean()) < 4 * error.std() / 1000
    assert abs((error * x.sign()).mean()) < 4 * error.std() / 1000


@pytest.mark.parametrize("exponent", [-100, -20, -6, 0, 60])
def test_bf16_with_residual_holds_24_bits_without_bias(exponent):
    x = floats_near(exponent, 10**6)
    nearest, residual = bits.split_bf16(x, random_lanes(10**6))
    error = (bits.join_bf16(nearest, residual).double() - x.double()) / 2.0 ** (exponent - 15)
    assert error.abs().max() < 1
    assert abs(error.mean()) < 4 * error.std() / 1000
    assert ((nearest.double() - x.double()).abs() <= 2.0 ** (exponent - 8) * 1.01).all(), (
        "the bf16 alone is the nearest"
    )


@given(st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda x: abs(x) < 3e38))
def test_rounding_to_nearest_is_pytorchs(x):
    x = torch.tensor([x], dtype=torch.float32)
    assert torch.equal(bits.round_bf16(x), x.bfloat16())


@given(st.integers(-(2**15), 2**15 - 1), st.integers(0, 2**16 - 1))
def test_what_fits_is_not_changed(pattern, random):
    """A value that has its place is kept by every rounding, whatever the random bits."""
    value = torch.tensor([pattern], dtype=torch.int16).view(torch.bfloat16)
    random = torch.tensor([random], dtype=torch.int32)
    if value.isfinite().item():
        assert bits.round_bf16(value.float(), random).view(torch.int16).item() == pattern
        assert torch.equal(bits.join_bf16(*bits.split_bf16(value.float(), random)), value.float())
    half = torch.tensor([pattern], dtype=torch.int16).view(torch.float16)
    if half.isfinite().item():
        assert bits.round_fp16(half.float(), random).view(torch.int16).item() == pattern


@triton.jit
def _all_of_bits(x, lanes, other, nearest, residual, joined, half, COUNT: tl.constexpr):
    groups = tl.arange(0, COUNT // 8)[None, :]
    place = tl.arange(0, COUNT)[None, :]
    random = bits.lanes_kernel(groups, 2**40 + 1, 7, 8, 9)
    value = tl.load(x + place)
    tl.store(lanes + place, random)
    tl.store(other + place, bits.other_bits_kernel(random))
    upper, rest = bits.split_bf16_kernel(value, random)
    tl.store(nearest + place, upper)
    tl.store(residual + place, rest)
    tl.store(joined + place, bits.join_bf16_kernel(upper, rest))
    tl.store(half + place, bits.round_fp16_kernel(value, random))


def test_every_device_function_is_bit_equal_to_its_twin():
    count = 1024
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.cat([floats_near(exponent, count // 16) for exponent in range(-26, 6, 2)]).to(device)
    dtypes = (torch.int32, torch.int32, torch.int16, torch.int8, torch.float32, torch.float16)
    got = [torch.empty(count, dtype=dtype, device=device) for dtype in dtypes]
    _all_of_bits[(1,)](x, *got, COUNT=count)
    random = bits.lanes(torch.arange(count // 8, device=device), 2**40 + 1, step=7, sample=8, stream=9).flatten()
    nearest, residual = bits.split_bf16(x, random)
    wanted = [random, bits.other_bits(random), nearest.view(torch.int16), residual]
    wanted += [bits.join_bf16(nearest, residual), bits.round_fp16(x, random)]
    for ours, twin in zip(got, wanted, strict=True):
        assert torch.equal(ours, twin)
