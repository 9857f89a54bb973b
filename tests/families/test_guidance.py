import pytest
import torch

from lowvram_db.families.guidance import Scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_row_is_multiplied_by_its_own_scale_as_by_a_number(dtype):
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = Scales([7.3, 0.5, 11.0]) * x
    assert got.dtype == dtype
    for row, scale in enumerate([7.3, 1.0, 11.0]):
        assert torch.equal(got[row], scale * x[row])


def test_a_batch_is_guided_where_one_of_its_pictures_is():
    assert Scales([0.0, 7.5]) > 1
    assert not Scales([0.0, 1.0]) > 1
