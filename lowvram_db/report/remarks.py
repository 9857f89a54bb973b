"""What a run's owner should know, in plain words."""

from collections.abc import Iterator

from lowvram_db.memory.size import gib
from lowvram_db.report.scores import Evaluation
from lowvram_db.report.story import Story

_FEWEST_PHOTOS = 3
_FORGOTTEN = 1.1  # times its loss before training, a class is on its way to be forgotten
_MEMORISED = 0.9  # the same for a subject that is learned by heart

_FINDINGS = {
    "not yet learned": "The subject is not yet learned: train for more steps, or at a higher learning rate.",
    "memorised": "The photos are memorised: train for fewer steps, or at a lower learning rate.",
    "the model is ruined": "The model is ruined: it no longer draws what it is asked for; lower the learning rate.",
    "the class is forgotten": "The class is forgotten: switch prior preservation on, or raise prior.weight.",
}


def remarks(story: Story, evaluation: Evaluation | None) -> Iterator[str]:
    """A sentence each, the weightiest first."""
    steps = int(story.number("train.steps") or 0)
    if story.last_step < steps:
        yield f"It stands at step {story.last_step:,} of {steps:,}; the same command goes on from the last checkpoint."
    elif not story.finished:
        yield "There is no finished model yet; the same command writes it."
    losses = {step for step, _ in story.metrics.get("loss", [])}
    unfinite = len({step for step, _ in story.metrics.get("lr", [])} - losses)
    if unfinite:
        many = f"{unfinite} step{'s' if unfinite > 1 else ''}"
        yield f"In {many} the loss was no number; a lower learning rate or fp32 helps."
    yield from _of_validation(story)
    yield from _of_memory(story)
    if story.photo_count and story.photo_count < _FEWEST_PHOTOS:
        yield f"There are only {story.photo_count} photos of the subject; three to six show it from more sides."
    last = evaluation.scores[-1].findings if evaluation else []
    yield from (_FINDINGS.get(finding, f"The last checkpoint was found to be: {finding}.") for finding in last)
    yield from (f"Left out here: {what}." for what in story.lacking)


def _of_validation(story: Story) -> Iterator[str]:
    last = {name: points[-1][1] for name, points in story.metrics.items() if name.startswith("validation_")}
    if last.get("validation_class", 1.0) > _FORGOTTEN:
        risen = f"{last['validation_class']:.2f} times its beginning"
        yield f"The loss on class images has risen to {risen}: the class is being forgotten."
    held_out, subject = last.get("validation_held_out"), last.get("validation_subject")
    if held_out is not None and subject is not None and subject < _MEMORISED and held_out > 1.0:
        yield "The loss falls on the photos trained on and rises on those kept back: they are being memorised."


def _of_memory(story: Story) -> Iterator[str]:
    peak = max((value for _, value in story.metrics.get("peak_bytes", [])), default=0.0)
    if story.budget and peak > story.budget:
        yield f"A step has taken {gib(peak)}, more than the budget of {gib(story.budget)}."
