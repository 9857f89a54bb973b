"""Pictures of a report: before and after, over the steps, over guidance scales, and the subject's photos."""

import base64
import io
from collections.abc import Iterable

from PIL import Image

from lowvram_db.report.curves import wide
from lowvram_db.report.markup import Html, element, foreign, shortened
from lowvram_db.report.story import LARGEST_SIDE, Photo, Story
from lowvram_db.sheet import Drawn

_THUMBNAIL = 0.5  # of the side of the largest pictures
_ALT = 160  # characters of a prompt that a screen reader is given for a picture


def step_name(step: int) -> str:
    return f"step {step:,}" if step else "base model"


def image(picture: Image.Image, alt: str, scale: float, class_: str | None = None) -> Html:
    """In the page itself. scale: of the largest side that a picture may have."""
    small = picture.convert("RGB")
    small.thumbnail((round(LARGEST_SIDE * scale),) * 2, Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, "JPEG", quality=85)
    source = "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
    return element("img", src=source, alt=alt, width=small.width, height=small.height, class_=class_)


def before_and_after(story: Story, scale: float) -> Html | None:
    """Every prompt at every guidance scale and seed, the first step's picture under the last one's."""
    if len(story.pictures) < 2:
        return None
    first, last = min(story.pictures), max(story.pictures)
    common = [drawn for drawn in story.pictures[last] if drawn in story.pictures[first]]
    if not common:
        return None
    pairs = [element("div", _pair(story, drawn, first, last, scale), data_choice=choice_of(drawn)) for drawn in common]
    intro = f"From the same noise: {step_name(first)} and {step_name(last)}. Move the edge, also by the arrow keys."
    return element("div", element("p", intro), picker(common), element("div", pairs, class_="pairs"))


def _pair(story: Story, drawn: Drawn, first: int, last: int, scale: float) -> Html:
    ends = element("div", element("span", step_name(first)), element("span", step_name(last)), class_="ends")
    said = shortened(drawn.prompt, _ALT)
    return element(
        "figure",
        element(
            "div",
            image(story.pictures[first][drawn], f"{step_name(first)}: {said}", scale, "before"),
            image(story.pictures[last][drawn], f"{step_name(last)}: {said}", scale, "after"),
            element("div", class_="edge"),
            element("input", type="range", min=0, max=100, value=50, aria_label=f"Before and after: {said}"),
            class_="pair",
        ),
        ends,
        element("figcaption", foreign(drawn.prompt), f", {_setting(drawn)}"),
    )


def film_strips(story: Story, scale: float) -> Html | None:
    """A strip a prompt, one picture a step, for every guidance scale and seed."""
    if len(story.pictures) < 3:
        return None
    drawn_ever = list(dict.fromkeys(drawn for step in reversed(story.pictures) for drawn in story.pictures[step]))
    strips = [element("div", _strip(story, drawn, scale), data_choice=choice_of(drawn)) for drawn in drawn_ever]
    return element("div", picker(drawn_ever), strips)


def _strip(story: Story, drawn: Drawn, scale: float) -> list[Html]:
    said = shortened(drawn.prompt, _ALT)
    frames = [
        element(
            "li",
            element(
                "figure",
                image(pictures[drawn], f"{step_name(step)}: {said}", scale * _THUMBNAIL),
                element("figcaption", step_name(step)),
            ),
        )
        for step, pictures in sorted(story.pictures.items())
        if drawn in pictures
    ]
    heading = element("h3", foreign(drawn.prompt), f", {_setting(drawn)}")
    return [heading, wide(f"{said}, {_setting(drawn)}, by steps", element("ol", frames, class_="strip"))]


def guidance_scales(story: Story, scale: float) -> Html | None:
    """The last pictures of the first seed, guidance scales beside each other."""
    pictures = story.pictures[max(story.pictures)] if story.pictures else {}
    scales = list(dict.fromkeys(drawn.guidance for drawn in pictures))
    if len(scales) < 2:
        return None
    rows = [
        (
            foreign(prompt),
            [
                _cell(
                    pictures.get(Drawn(prompt, guidance, 0)), f"guidance {guidance:g}: {shortened(prompt, _ALT)}", scale
                )
                for guidance in scales
            ],
        )
        for prompt in dict.fromkeys(drawn.prompt for drawn in pictures)
    ]
    return picture_table("Guidance scales", [f"guidance {guidance:g}" for guidance in scales], rows)


def _cell(picture: Image.Image | None, alt: str, scale: float) -> Html:
    return Html() if picture is None else image(picture, alt, scale * _THUMBNAIL)


def picture_table(label: str, columns: Iterable[str | Html], rows: Iterable[tuple[Html, list[Html]]]) -> Html:
    """Pictures under the names of columns, each row with its own."""
    head = element("tr", element("td"), *(element("th", column, scope="col") for column in columns))
    body = [
        element("tr", element("th", name, scope="row"), *(element("td", cell) for cell in cells))
        for name, cells in rows
    ]
    return wide(label, element("table", element("thead", head), element("tbody", body), class_="pictures"))


def older_sheets(story: Story, scale: float) -> Html | None:
    """Sheets that do not tell what is where, as they are."""
    shown = [
        element(
            "figure",
            image(sheet, f"All pictures of {step_name(step)}", 3 * scale, "sheet"),
            element("figcaption", step_name(step)),
        )
        for step, sheet in sorted(story.sheets.items())
    ]
    return element("div", shown) if shown else None


def photo_set(story: Story, scale: float) -> Html | None:
    """The subject's photos with what is to be said of each."""
    if not story.photos:
        return None
    side = int(story.number("train.resolution") or 0)
    shown = [
        element("li", element("figure", image(photo.small, "", scale * _THUMBNAIL), _photo_caption(photo, side)))
        for photo in story.photos
    ]
    more = story.photo_count - len(shown)
    return element(
        "div", element("ul", shown, class_="photos"), element("p", f"and {more} more", class_="soft") if more else None
    )


def _photo_caption(photo: Photo, side: int) -> Html:
    enlarged = f"; smaller than the {side} px it is trained at, so it is enlarged"
    small = enlarged if min(photo.width, photo.height) < side else ""
    return element("figcaption", foreign(photo.name, 200), f", {photo.width} × {photo.height} px{small}")


def choice_of(drawn: Drawn) -> str:
    return f"{drawn.guidance:g} {drawn.seed}"


def picker(drawn_ever: Iterable[Drawn]) -> Html | None:
    """Chooses one guidance scale and seed of all that are there; None where there is but one."""
    choices = {choice_of(drawn): _setting(drawn) for drawn in drawn_ever}
    if len(choices) < 2:
        return None
    options = [element("option", said, value=choice) for choice, said in choices.items()]
    return element("p", element("label", "Show ", element("select", options)), class_="picker", hidden=True)


def _setting(drawn: Drawn) -> str:
    return f"guidance {drawn.guidance:g}, seed {drawn.seed}"
