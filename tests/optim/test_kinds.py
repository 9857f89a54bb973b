import subprocess
import sys
from typing import get_args

import pytest
from torch import nn

from lowvram_db.optim.kinds import KINDS, Name, StepsInBackward
from lowvram_db.sections import OptimizerConfig
from lowvram_db.train.optimizer import build


def test_every_name_has_its_kind():
    assert set(KINDS) == set(get_args(Name))


@pytest.mark.parametrize("name", KINDS)
def test_an_optimizer_offers_what_its_kind_says(name):
    group = {"params": [("weight", nn.Parameter(nn.Linear(64, 64).weight.detach()))], "lr": 1e-3}
    weights = "bf16" if KINDS[name].stores_weights else "fp32"
    optimizer = build(OptimizerConfig(name=name), [group], weights=weights)
    assert isinstance(optimizer, StepsInBackward) == KINDS[name].steps_in_backward
    assert all(type(optimizer).__module__.startswith(package) for package in KINDS[name].packages)


def test_settings_ask_without_torch():
    script = "import sys, lowvram_db.config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "False"
