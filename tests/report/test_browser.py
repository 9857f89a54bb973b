"""Edge, pickers and values in a real browser, by mouse and by keys; and that the page asks for nothing."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from lowvram_db.report import write_comparison, write_report

_spec = spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
driver = module_from_spec(_spec)
_spec.loader.exec_module(driver)

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="Windows hands no pipes on to a browser"),
    pytest.mark.skipif(driver.chromium() is None, reason="there is no Chromium (Debian: apt install chromium)"),
]
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
BOX = "(b => [b.left, b.top, b.width, b.height])(document.querySelector({!r}).getBoundingClientRect())"
SHOWN = "[...document.querySelectorAll('.pairs figcaption')].filter(e => e.offsetParent).map(e => e.textContent)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = driver.Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.fixture
def page(browser, make_run):
    """Opened, of a run with a hostile prompt."""
    browser.events.clear()
    browser.open(write_report(make_run(prompts=["a photo of a jellyfish", HOSTILE])))
    return browser


def test_the_edge_is_moved_by_keys_and_by_the_mouse(page):
    split = "getComputedStyle(document.querySelector('.pair .after')).clipPath"
    assert page.value(split) == "inset(0px 0px 0px 50%)"
    page.value("document.querySelector('.pair input').focus()")
    for _ in range(3):
        page.press("ArrowRight")
    assert page.value(split) == "inset(0px 0px 0px 53%)"
    assert page.value("document.activeElement.getAttribute('aria-valuetext')") == "53% before, 47% after"
    left, top, width, height = page.value(BOX.format(".pair"))
    page.drag((left + 0.2 * width, top + height / 2), (left + 0.75 * width, top + height / 2))
    assert abs(float(page.value("document.querySelector('.pair input').value")) - 75) <= 2


def test_one_guidance_scale_and_seed_at_a_time(page):
    assert [said.endswith(", guidance 2.5, seed 0") for said in page.value(SHOWN)] == [True, True]
    page.value("document.querySelector('.picker select').focus()")
    page.press("ArrowDown")
    assert [said.endswith(", guidance 2.5, seed 1") for said in page.value(SHOWN)] == [True, True]


def test_values_are_read_off_by_mouse_and_keys(page):
    said = "document.querySelector('[aria-labelledby=curves] .chart output').textContent"
    page.value("document.querySelector('[aria-labelledby=curves] .chart').scrollIntoView()")
    left, top, width, height = page.value(BOX.format("[aria-labelledby=curves] .chart svg"))
    page.move(left + width / 2, top + height / 2)
    step = int(page.value(said).partition(":")[0])
    assert 19 <= step <= 22 and "subject 0.2" in page.value(said) and "class 0.1" in page.value(said)
    page.value("document.querySelector('[aria-labelledby=curves] .chart input').focus()")
    page.press("ArrowRight")
    assert page.value(said).startswith(f"{step + 1}: ")


def of_one(make_run, tmp_path):
    return write_report(make_run("again", prompts=[HOSTILE]))


def of_several(make_run, tmp_path):
    other = make_run("other", prompts=[HOSTILE, "b"], guidance=[7.0], model={"name": HOSTILE})
    return write_comparison([make_run("again", prompts=[HOSTILE]), other], tmp_path / "page.html")


@pytest.mark.parametrize("written", [of_one, of_several])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)], ids=["desktop", "phone, dark"])
def test_it_is_quiet_asks_for_nothing_and_fits(page, make_run, tmp_path, width, dark, written):
    page.events.clear()
    page.open(written(make_run, tmp_path), width=width, dark=dark)
    assert page.value("document.title") in ("again", "2 runs compared")
    assert page.value("document.querySelectorAll('script').length") == 1
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value("getComputedStyle(document.body).backgroundColor == 'rgb(20, 23, 27)'") == dark
    assert page.value("[...document.images].filter(i => i.offsetParent).every(i => i.complete && i.naturalWidth)")
    noises = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert not [event for event in page.events if event["method"] in noises]
    requests = [event["params"] for event in page.events if event["method"] == "Network.requestWillBeSent"]
    asked = [request["request"]["url"] for request in requests]
    assert asked[0].startswith("file:") and all(url.startswith("data:image/jpeg") for url in asked[1:])
