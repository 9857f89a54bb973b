import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.evaluate.recommend import (
    FORGOTTEN,
    MEMORISED,
    NOT_LEARNED,
    RUINED,
    Gains,
    findings,
    gains,
    pareto,
    recommend,
)


def made(learned, follows=1.0, kept=1.0, scatter=0.0):
    """Gains of four seeds around means."""
    around = torch.tensor([-1.0, 1.0, -1.0, 1.0]) * scatter
    return Gains(learned + around, torch.full((4,), follows), torch.full((4,), kept))


def scored(subject, prompt, likeness, diversity, memorised):
    values = {"subject": subject, "prompt": prompt, "class_likeness": likeness, "class_diversity": diversity}
    return {name: torch.full((4,), value) for name, value in {**values, "memorised": memorised}.items()}


BASE = scored(0.2, 0.8, 0.2, 1.0, 0.0)


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (scored(0.7, 0.8, 0.25, 0.95, 0.0), []),
        (scored(0.4, 0.8, 0.25, 0.95, 0.0), [NOT_LEARNED]),
        (scored(0.7, 0.8, 0.7, 0.95, 0.0), [FORGOTTEN]),
        (scored(0.7, 0.8, 0.25, 0.3, 0.0), [FORGOTTEN]),
        (scored(0.7, 0.8, 0.25, 0.95, 0.9), [MEMORISED]),
        (scored(0.7, 0.8, 0.7, 0.3, 0.9), [MEMORISED, FORGOTTEN]),
        (scored(0.1, 0.1, 0.0, 0.3, 0.0), [RUINED]),
    ],
)
def test_what_is_wrong_is_named(scores, found):
    assert findings(scores, gains(scores, BASE, ceiling=0.8)) == found


def test_gains_are_shares_of_what_there_was_to_win_and_to_lose():
    gained = gains(scored(0.5, 0.6, 0.5, 0.9, 0.0), BASE, ceiling=0.8)
    assert gained.means() == pytest.approx((0.5, 0.75, 0.5))
    without = {**BASE, "prompt": None}
    assert gains(without, without, ceiling=0.8).means() == pytest.approx((0, 1, 1))


GAIN = st.floats(0, 1)


@given(st.dictionaries(st.integers(1, 900), st.tuples(GAIN, GAIN, GAIN), min_size=1, max_size=8))
def test_no_step_is_recommended_that_another_betters_in_everything(steps):
    gained = {step: made(*own) for step, own in steps.items()}
    front = pareto(gained)
    for step, own in steps.items():
        bettered = any(
            other != own and all(a >= b for a, b in zip(other, own, strict=True)) for other in steps.values()
        )
        assert (step in front) != bettered or step not in front
    chosen = recommend(gained, {step: [] for step in gained}).step
    assert chosen in front
    assert gained[chosen].product.mean() == max(gains_.product.mean() for gains_ in gained.values())


def test_of_steps_that_chance_alone_parts_the_earliest_is_kept():
    steps = {100: made(0.5), 200: made(0.80, kept=0.9), 300: made(0.81, kept=0.9, scatter=0.1)}
    close = recommend(steps, {step: [] for step in steps})
    assert close.step == 300, "200 is dominated"
    steps[200] = made(0.80, kept=0.91)
    steps[300] = made(0.82, kept=0.9, scatter=0.1)
    close = recommend(steps, {step: [] for step in steps})
    assert close.step == 200 and "which step 300 does not better by more than a standard error" in close.reason
    steps[300] = made(0.82, kept=0.9)
    assert recommend(steps, {step: [] for step in steps}).step == 300


@pytest.mark.parametrize("lost", ["follows", "kept"])
def test_likeness_alone_does_not_decide(lost):
    steps = {100: made(0.8, **{lost: 0.9}), 200: made(0.9, **{lost: 0.6})}
    assert recommend(steps, {step: [] for step in steps}).step == 100


def test_the_reason_tells_what_was_won_and_what_is_left():
    assert recommend({100: made(0.8, follows=0.9, kept=0.7)}, {100: []}).reason == (
        "of 1 step kept, 100 has the best balance: 80% of the way from the base model to the photos, 90% of its "
        "obedience to prompts and 70% of the class are there"
    )


def test_a_step_with_a_finding_is_the_last_resort_and_says_so():
    steps = {100: made(0.9, kept=0.45), 200: made(0.65, kept=0.6)}
    assert recommend(steps, {100: [FORGOTTEN], 200: []}).step == 200
    worst = recommend(steps, {100: [FORGOTTEN], 200: [FORGOTTEN]})
    assert "but the class is forgotten (train with prior.enabled = true" in worst.reason
