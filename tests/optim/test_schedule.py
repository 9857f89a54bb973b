import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from lowvram_db.optim.schedule import learning_rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 20), (5, 20), (20, 20)])
def test_equals_transformers_schedules(schedule, warmup, steps):
    """Theirs begins a warm-up with a step at zero; ours is the same line one step ahead."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-6)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    theirs = []
    for _ in range(steps + 1):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    for step in range(steps):
        wanted = theirs[step + 1] if step < warmup else theirs[step]
        if step == warmup - 1:
            wanted = 2e-6
        assert learning_rate(step, schedule=schedule, lr=2e-6, warmup=warmup, steps=steps) == pytest.approx(wanted)


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    lr=st.floats(1e-9, 1.0),
    steps=st.integers(1, 2000),
    data=st.data(),
)
def test_never_zero_never_above(schedule, lr, steps, data):
    warmup = data.draw(st.integers(0, steps))
    step = data.draw(st.integers(0, steps - 1))
    rate = learning_rate(step, schedule=schedule, lr=lr, warmup=warmup, steps=steps)
    assert 0 < rate <= lr
    assert math.isfinite(rate)
