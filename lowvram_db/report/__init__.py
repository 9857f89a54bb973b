"""One page a run that can be sent to a friend: a file of HTML with everything in it, made of the run's folder alone.

Nothing here imports torch: a report is made in a second, also where the run came from another machine.
"""

from pathlib import Path

from lowvram_db.report import comparison, pictures, sections
from lowvram_db.report.markup import element, foreign
from lowvram_db.report.page import compose, write_page
from lowvram_db.report.remarks import remarks
from lowvram_db.report.scores import Evaluation, read_evaluation, scores_by_step
from lowvram_db.report.story import Story, tell
from lowvram_db.run import Run


def write_report(run: Path, out: Path | None = None) -> Path:
    """The page of one run, by default into its folder; returns where it is.

    Raises UserError where there is no run, something else is called so, or the page cannot be written.
    """
    out = Run(run).report if out is None else out
    story = tell(run)
    evaluation = _evaluation(story)
    write_page(out, lambda scale: _page(story, evaluation, scale))
    return out


def write_comparison(runs: list[Path], out: Path) -> Path:
    """A page of several runs. Raises UserError as write_report does."""
    stories = [tell(run) for run in runs]
    if len({story.name for story in stories}) < len(stories):
        for story, run in zip(stories, runs, strict=True):
            story.name = str(run)
    evaluations = [_evaluation(story) for story in stories]
    write_page(out, lambda scale: _comparison(stories, evaluations, scale))
    return out


def _page(story: Story, evaluation: Evaluation | None, scale: float) -> str:
    said = [element("li", foreign(remark)) for remark in remarks(story, evaluation)]
    head = element("div", sections.facts(story), element("ul", said, class_="warnings") if said else None)
    return compose(
        story.name,
        head,
        [
            ("Before and after", pictures.before_and_after(story, scale)),
            ("Over the steps", pictures.film_strips(story, scale)),
            ("Guidance scales", pictures.guidance_scales(story, scale)),
            ("Pictures", pictures.older_sheets(story, scale)),
            ("Scores", scores_by_step(evaluation) if evaluation else None),
            ("Curves", sections.curves(story)),
            ("Memory", sections.memory(story)),
            ("Identifier", sections.identifier(story)),
            ("Photos", pictures.photo_set(story, scale)),
            ("Settings", sections.reproduction(story)),
        ],
    )


def _comparison(stories: list[Story], evaluations: list[Evaluation | None], scale: float) -> str:
    names = [element("li", foreign(story.name)) for story in stories]
    head = element("div", element("ul", names), comparison.remarks_on_all(stories, evaluations))
    return compose(
        f"{len(stories)} runs compared",
        head,
        [
            ("Settings that differ", comparison.differing_settings(stories)),
            ("Pictures", comparison.pictures_of_all(stories, scale)),
            ("Scores", comparison.scores_of_all(stories, evaluations)),
            ("Curves", comparison.curves_of_all(stories)),
        ],
    )


def _evaluation(story: Story) -> Evaluation | None:
    try:
        return read_evaluation(story.evaluation)
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        story.lacking.append(f"evaluation.json: is not what is written there ({error})")
        return None
