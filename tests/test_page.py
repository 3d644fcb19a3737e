"""The page of report.py in a real browser: tokens, keyboard, narrow windows, dark mode, offline."""

import math
import re
import shutil

import pytest
from test_report import HOSTILE, completion, make_run, sample, tokens

import report

selenium = pytest.importorskip("selenium.webdriver")
from selenium.webdriver import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not DRIVER, reason="needs Chromium and its driver")
_ = make_run  # a fixture
BROWSER_FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking")
BROWSER_FLAGS += ("disable-dev-shm-usage",)  # in a container that folder may be small
TRANSPARENT = "rgba(0, 0, 0, 0)"


@pytest.fixture(scope="module")
def browser():
    options = selenium.ChromeOptions()
    for flag in BROWSER_FLAGS:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, make_run):
    """A function that opens the page of a run of these samples, in a window of some width."""

    def open_page(*samples: dict, width: int = 1200, **made):
        run = make_run(*samples, **made)
        report.main([str(run)])
        browser.set_window_size(width, 900)
        browser.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        browser.get((run / "report.html").as_uri())
        return browser

    yield open_page
    complaints = [entry["message"] for entry in browser.get_log("browser")]
    assert complaints == []  # no error of the script, nothing that the security policy stopped


def words(browser, row: int = 0):
    return browser.find_elements(By.CSS_SELECTOR, ".words")[row]


def spans(browser, row: int = 0) -> list:
    """The elements of a completion's tokens. The browser makes them when it shows the group."""

    def find(_):
        return words(browser, row).find_elements(By.TAG_NAME, "span")

    browser.execute_script("arguments[0].scrollIntoView()", words(browser, row))
    WebDriverWait(browser, 10).until(find)
    return find(None)


def story(browser) -> dict[str, str]:
    """What the page tells about the token that was chosen; {} if none is."""
    place = browser.find_element(By.ID, "story")
    lines = place.find_elements(By.TAG_NAME, "div") if place.is_displayed() else []
    values = [(line.find_element(By.TAG_NAME, "b").text, line.text) for line in lines]
    return {text.removesuffix(value).strip(): value for value, text in values}


def told_tokens(texts: list[str]) -> dict:
    return {key: [-0.1] * len(texts) for key in tokens() if key != "texts"} | {"texts": texts}


def background(element) -> str:
    return element.value_of_css_property("background-color")


def test_a_token_tells_its_story_under_the_pointer_and_on_a_tap(opened):
    browser = opened(sample(0, completion("ab", tokens=tokens(), advantage=-1.25)))
    first, second, stop = spans(browser)
    assert [each.text for each in (first, second, stop)] == ["a", "b", "<|im_end|>"]
    assert story(browser) == {}
    ActionChains(browser).move_to_element(second).perform()
    before, after = (float(f"{math.exp(logprob):.3g}") for logprob in (-1.0, -2.0))
    assert story(browser) == {
        "token 2 of 3": "“b”",
        "probability": f"{before} → {after}",
        "log-prob changed by": "−1",  # noqa: RUF001
        "advantage": "−1.25",  # noqa: RUF001
        "KL to the reference": "0 nats",
        "weight in the loss": "0.25",
    }
    first.click()
    assert story(browser)["token 1 of 3"] == "“a”"
    browser.find_element(By.TAG_NAME, "h1").click()
    assert story(browser) == {}


def test_the_arrow_keys_walk_through_the_tokens(opened):
    browser = opened(sample(0, completion("ab", tokens=tokens()), completion("old")))
    spans(browser)
    browser.find_element(By.NAME, "words").send_keys(Keys.TAB)  # the last field before the group
    steps = [("", 1), (Keys.ARROW_RIGHT, 2), (Keys.END, 3), (Keys.ARROW_RIGHT, 3)]
    steps += [(Keys.ARROW_LEFT, 2), (Keys.HOME, 1), (Keys.ARROW_LEFT, 1)]
    for key, place in steps:
        ActionChains(browser).send_keys(key).perform()
        assert f"token {place} of 3" in story(browser)
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert story(browser) == {}


def test_the_keys_of_the_browser_are_left_alone(opened):
    browser = opened(sample(0, completion("ab", tokens=tokens())))
    spans(browser)
    browser.execute_script("arguments[0].focus()", words(browser))
    for key in (Keys.CONTROL, Keys.SHIFT):
        ActionChains(browser).key_down(key).send_keys(Keys.END).key_up(key).perform()
        assert "token 1 of 3" in story(browser)


def test_a_token_stays_chosen_out_of_sight_and_after_a_look_elsewhere(opened):
    texts = ["word "] * 400
    group = [completion("".join(texts), tokens=told_tokens(texts))] * 2
    browser = opened(*[sample(10 * step, *group) for step in range(10)])
    spans(browser)
    browser.execute_script("arguments[0].focus()", words(browser))
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    spans(browser, 19)
    WebDriverWait(browser, 10).until(
        lambda _: words(browser, 1).find_elements(By.TAG_NAME, "span") == []
    )
    spans(browser, 1)
    browser.execute_script("document.activeElement.blur(); arguments[0].focus()", words(browser))
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert "token 3 of 400" in story(browser)
    (chosen,) = browser.find_elements(By.CSS_SELECTOR, ".here")
    assert chosen.id == spans(browser)[2].id
    spans(browser, 19)[0].click()
    WebDriverWait(browser, 10).until(
        lambda _: words(browser, 0).find_elements(By.TAG_NAME, "span") == []
    )


def test_a_completion_is_filled_when_the_keyboard_reaches_it(opened):
    texts = ["word "] * 400
    group = [completion("".join(texts), tokens=told_tokens(texts))] * 2
    browser = opened(*[sample(10 * step, *group) for step in range(10)])
    browser.execute_script("arguments[0].focus({ preventScroll: true })", words(browser, 19))
    assert "token 1 of 400" in story(browser)


def test_a_story_ends_when_its_completion_is_filtered_out(opened):
    browser = opened(sample(0, completion("ab", tokens=tokens())))
    spans(browser)[0].click()
    assert story(browser)
    browser.find_element(By.NAME, "words").send_keys("zzz")
    assert story(browser) == {}


def test_what_the_keyboard_reaches_is_spoken(opened):
    browser = opened(sample(0, completion("ab", tokens=tokens())))
    spoken = browser.find_element(By.ID, "spoken")
    ActionChains(browser).move_to_element(spans(browser)[1]).perform()
    assert spoken.get_property("textContent") == ""  # the pointer is silent
    browser.execute_script("arguments[0].focus()", words(browser))
    assert spoken.get_property("textContent").startswith("token 2 of 3 “b”, probability 0.368 → ")


def test_near_1_the_story_tells_what_is_missing_to_1(opened):
    told = tokens(old_logprobs=[-1e-4, 0.0, -0.1], new_logprobs=[-5e-5, 0.0, None])
    first, second, third = spans(opened(sample(0, completion("ab", tokens=told))))
    seen = {}
    for span in (first, second, third):
        span.click()
        seen[span.text] = story(span.parent)["probability"]
    assert seen == {
        "a": "1 − 0.0001 → 1 − 0.00005",  # noqa: RUF001
        "b": "1 → 1",
        "<|im_end|>": "0.905 → –",  # noqa: RUF001
    }


def test_a_switch_colors_what_the_update_did(opened):
    browser = opened(sample(0, completion("ab", tokens=tokens(), advantage=-1.0)))
    raised, lowered, same = spans(browser)
    row = browser.find_element(By.CSS_SELECTOR, "tbody tr")
    legends = [
        browser.find_element(By.CSS_SELECTOR, f"p.{name}") for name in ("advantage", "update")
    ]
    assert background(row) != TRANSPARENT
    assert {background(each) for each in (raised, lowered, same)} == {TRANSPARENT}
    assert [legend.is_displayed() for legend in legends] == [True, False]
    advantage = browser.find_element(By.CSS_SELECTOR, "[name=view]")
    advantage.send_keys(Keys.ARROW_RIGHT)  # a switch that the keyboard reaches
    assert background(row) == TRANSPARENT
    assert [legend.is_displayed() for legend in legends] == [False, True]
    red, blue = (
        [int(channel) for channel in re.findall(r"\d+", background(each))][:3]
        for each in (lowered, raised)
    )
    assert red[0] > red[2] and blue[2] > blue[0]
    assert background(same).endswith(", 0)")
    # a log-prob that fell by 1, where 1 is the strongest color, and one that rose by a quarter
    strengths = [float(background(each).split(",")[-1][:-1]) for each in (lowered, raised)]
    assert strengths[0] == pytest.approx(4 * strengths[1], rel=0.05)


def test_hostile_tokens_stay_text_in_a_browser(opened):
    texts = list(HOSTILE)
    browser = opened(sample(0, completion("".join(texts), tokens=told_tokens(texts))))
    seen = [visible or text for text, visible in HOSTILE.items()]
    assert [each.get_property("textContent") for each in spans(browser)] == seen
    assert browser.title == "run"
    assert len(browser.find_elements(By.CSS_SELECTOR, "img, script:not([type])")) == 2
    counted = browser.find_element(By.NAME, "told").text
    assert counted == "1 of 1 completions"


def test_hostile_texts_stay_text_in_a_browser(opened):
    texts = list(HOSTILE)
    browser = opened(sample(0, *[completion(text) for text in texts]), command=" ".join(texts))
    seen = [visible or text for text, visible in HOSTILE.items()]
    places = browser.find_elements(By.CSS_SELECTOR, ".words")
    assert [place.get_property("textContent") for place in places] == seen
    assert browser.title == "run"
    assert browser.find_elements(By.NAME, "view") == []  # no tokens, no switch


def test_only_groups_near_the_window_have_elements_for_their_tokens(opened):
    texts = ["word "] * 400
    group = [completion("".join(texts), tokens=told_tokens(texts))] * 2
    browser = opened(*[sample(10 * step, *group) for step in range(20)])
    last = 2 * 20 - 1
    assert len(spans(browser, 0)) == 400
    assert words(browser, last).find_elements(By.TAG_NAME, "span") == []
    assert len(spans(browser, last)) == 400
    WebDriverWait(browser, 10).until(
        lambda _: words(browser, 0).find_elements(By.TAG_NAME, "span") == []
    )
    assert words(browser, 0).get_property("textContent") == "".join(texts)


def test_the_filters_read_the_texts_not_the_tokens(opened):
    rows = [completion("ab", tokens=tokens()), completion("cd", tokens=tokens())]
    browser = opened(sample(0, *rows))
    spans(browser)
    field, told = (browser.find_element(By.NAME, name) for name in ("words", "told"))
    for text, count in (("ab", 1), ("im_end", 0), ("", 2)):
        field.clear()
        field.send_keys(text or "x" + Keys.BACKSPACE)
        assert told.text == f"{count} of 2 completions"


def test_a_phone_needs_no_sideways_scrolling(opened):
    texts = ["<reasoning>", "a long word " * 20, "</reasoning>"]
    row = completion("".join(texts), tokens=told_tokens(texts))
    browser = opened(sample(0, row), width=500)  # the narrowest window of Chromium
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
    )
    try:
        spans(browser)[1].click()
        assert "token 2 of 3" in story(browser)
        sizes = browser.execute_script(
            "return [document.documentElement.scrollWidth, window.innerWidth]"
        )
        assert sizes == [360, 360]
        browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
        bottom, top = browser.execute_script(
            "return [arguments[0].getBoundingClientRect().bottom,"
            " document.getElementById('story').getBoundingClientRect().top]",
            words(browser),
        )
        assert bottom < top  # the story covers no text that cannot be scrolled up
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def luminance(color: list[float]) -> float:
    """Relative luminance of sRGB, as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return sum(part * c for part, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(ink: str, *layers: str) -> float:
    """WCAG 2 contrast of a color on layers of color, the lowest one first."""
    mixed = [0.0, 0.0, 0.0]
    for layer in layers:
        *channels, alpha = [float(n) for n in re.findall(r"[\d.]+", layer)] + [1.0] * (
            layer.count(",") == 2
        )
        mixed = [alpha * c / 255 + (1 - alpha) * m for c, m in zip(channels, mixed, strict=True)]
    ink = [float(n) / 255 for n in re.findall(r"[\d.]+", ink)[:3]]
    low, high = sorted([luminance(ink), luminance(mixed)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["advantage", "update"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_strongest_colors_leave_the_text_readable(opened, scheme, view, sign):
    """At least 4.5 to 1, as WCAG 2 asks for (level AA)."""
    told = tokens(new_logprobs=[-0.5 + 0.4 * sign, -1.0 + sign, -0.1 + sign])
    row = completion("ab", tokens=told, advantage=9.0 * sign, shape_named=True)
    browser = opened(sample(0, row))
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    all_spans = spans(browser)
    browser.find_element(By.CSS_SELECTOR, f"[value={view}]").click()
    group, line = (browser.find_element(By.CSS_SELECTOR, name) for name in (".group", "tbody tr"))
    below = [background(group), background(line)]
    for span in all_spans:
        ink = span.value_of_css_property("color")
        assert contrast(ink, *below, background(span)) >= 4.5
    mark = browser.find_element(By.TAG_NAME, "small")
    assert contrast(mark.value_of_css_property("color"), *below) >= 4.5


def test_dark_mode_has_light_ink_on_a_dark_page(opened):
    browser = opened(sample(0, completion("ab", tokens=tokens())))
    shades = {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        body = browser.find_element(By.TAG_NAME, "body")
        colors = (body.value_of_css_property(name) for name in ("background-color", "color"))
        shades[scheme] = [int(re.findall(r"\d+", color)[0]) for color in colors]
    page, ink = shades["light"]
    assert page > ink
    page, ink = shades["dark"]
    assert page < ink
