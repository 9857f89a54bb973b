"""Know before a run that it fits: what it will need, and the fastest way that stays inside a budget."""

import contextlib
import gc
from collections.abc import Iterator

from lowvram_db.config import Config
from lowvram_db.formats.source import find_configs
from lowvram_db.plan import remember
from lowvram_db.plan.result import Plan


def make_plan(config: Config, budget: int | None, explain: bool = False) -> Plan:
    """The plan of a config for `budget` bytes of GPU memory, from the model's config files alone.

    Raises UserError where the model is not known or its config files are not right.
    """
    configs = find_configs(config.model.name, config.model.revision, config.model.reading)
    key = remember.key(config, configs, budget, explain)
    plan = remember.recall(key)
    if plan is None:
        with _without_garbage_collection():
            # Heavy, and not wanted where the answer is known.
            from lowvram_db.families import open_blank
            from lowvram_db.plan.choose import choose

            plan = choose(config, open_blank(configs, config.model.prediction_type), budget, explain)
        remember.keep(key, plan)
    return plan


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Imports and traces make many objects that live on: to look through them all the time takes a quarter of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
