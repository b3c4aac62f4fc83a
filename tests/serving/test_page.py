"""The page in a real browser, against a server that has no model."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_server import PLAIN, WORDS, Fake, controller
from helpers.serving import MESSAGES, PROMPT, chat_folder, controllers_of, listening
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

import mlx_lqr
from mlx_lqr.serving.app import application
from mlx_lqr.serving.guard import Access
from mlx_lqr.serving.service import Service

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
REFUSED = "Failed to load resource"
"""What the console says of each answer with an error's status."""
TIMEOUT = 15_000
"""Milliseconds that anything may take where others use the processor, too."""
expect.set_options(timeout=TIMEOUT)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        line = "no Chromium on this machine; on Debian or Ubuntu: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(line)
        pytest.skip(line)
    options = {"executable_path": executable, "args": ["--no-sandbox"]}
    with sync_playwright() as playwright, playwright.chromium.launch(**options) as launched:
        yield launched


Open = Callable[..., Page]


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def opened(browser: Browser, fake: Fake) -> Iterator[Open]:
    """Opens the page. Whatever a test does, no request leaves the server and the console holds no complaint."""
    complaints: list[str] = []
    with ExitStack() as stack:
        port_of_fake = stack.enter_context(listening(fake.app()))

        def open_page(*, port: int = port_of_fake, width: int = 1280, height: int = 800, scheme: str = "light") -> Page:
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            stack.callback(context.close)
            context.set_default_timeout(TIMEOUT)
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            page, address = context.new_page(), f"http://127.0.0.1:{port}/"

            def message(message: ConsoleMessage) -> None:
                if message.type in ("error", "warning") and REFUSED not in message.text:
                    complaints.append(message.text)

            def request(request: Request) -> None:
                if not request.url.removeprefix("blob:").startswith(address):
                    complaints.append(f"a request went to {request.url}")

            page.on("console", message)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", request)
            page.goto(address)
            return page

        yield open_page
    assert not complaints


def enter(page: Page, question: str) -> None:
    page.get_by_label("Your question").fill(question)
    page.get_by_label("Your question").press("Enter")


def ask(page: Page, question: str = "What did you do?") -> None:
    turns = page.locator(".turn")
    before = turns.count()
    enter(page, question)
    expect(turns).to_have_count(before + 1)  # before which the button still says that nothing is being answered


def ended(page: Page) -> None:
    page.get_by_role("button", name="Send").wait_for()


def prose(page: Page, kind: str) -> Locator:
    return page.locator(f".answer.{kind} .prose").last


def levels(page: Page, kind: str, layer: int = 29) -> list[float]:
    """Heights of the points of a line in the plot of a layer, upwards."""
    path = page.locator(f"[data-layer='{layer}'] path.{kind}").get_attribute("d") or ""
    return [-float(point.split(",")[1]) for point in path.split()]


def said_to(fake: Fake, path: str) -> list[Any]:
    return [body for asked, body in fake.requests if asked.startswith(path)]


def test_the_slider_changes_the_next_words_and_the_plot_follows(opened: Open, fake: Fake) -> None:
    fake.hold_at = 20
    page = opened()
    slider = page.get_by_role("slider", name="ocean, strength")
    expect(page.get_by_role("button", name="ocean: Normal")).to_have_attribute("aria-pressed", "true")
    ask(page)
    for kind in ("steered", "unsteered"):  # both are being written
        expect(prose(page, kind)).to_have_text(re.compile(r"(\w+\W+){19}\w+\W*"))
    number = page.get_by_label("ocean, strength as a number")
    number.fill("0.5")
    number.press("Enter")
    expect(page.locator(".answer.steered h3")).to_have_text("Steeredocean 2.23 → 0.5")
    fake.hold_at = None
    ended(page)
    words = re.findall(r"\w+", prose(page, "steered").inner_text())
    assert len(words) == 60
    of_the_ocean = [place for place, word in enumerate(words) if word in WORDS["ocean"]]
    assert of_the_ocean == [*range(1, 20, 2)]  # every second word, until the slider moved
    before, after = prose(page, "steered").evaluate(
        "prose => { const mark = prose.querySelector('.changed'), range = document.createRange();"
        " range.setStart(prose, 0); range.setEndBefore(mark); const before = range.toString();"
        " range.setEndAfter(prose.lastChild); range.setStartAfter(mark); return [before, range.toString()] }"
    )
    assert [len(re.findall(r"\w+", part)) for part in (before, after)] == [20, 40]  # a mark stands where it moved
    assert re.findall(r"\w+", prose(page, "unsteered").inner_text()) == [PLAIN[n % len(PLAIN)] for n in range(60)]
    assert said_to(fake, "/v1/steering/") == [{"steering": {"ocean": 0.5}}]

    setpoint, feature = levels(page, "setpoint"), levels(page, "feature")
    assert len(setpoint) == len(feature) == 60
    assert setpoint == [setpoint[0]] * 20 + [setpoint[-1]] * 40
    assert setpoint[0] > setpoint[-1]
    assert feature[19] > feature[-1]
    page.locator(".charts").press("Home")
    expect(page.locator(".reading")).to_contain_text("Token 1, “I”. Layer 29: ocean ")
    expect(page.locator(".reading")).to_contain_text("of 31.2, push")

    slider.dblclick()  # the recommended strength
    assert number.input_value() == "2.229"
    assert slider.get_attribute("min") == "-2.7"
    assert float(slider.get_attribute("max") or 0) == pytest.approx(1.5 * 2.7)


def test_dragging_sends_a_few_requests_and_always_the_last_strength(opened: Open, fake: Fake) -> None:
    fake.hold_at = 10
    page = opened()
    ask(page)
    expect(prose(page, "steered")).to_contain_text("salt")
    page.clock.install()
    page.clock.pause_at(datetime.now() + timedelta(hours=1))
    page.get_by_role("slider", name="ocean, strength").focus()
    for _ in range(40):
        page.keyboard.press("ArrowLeft")
    heading = page.locator(".answer.steered h3")
    expect(heading).to_contain_text("ocean 2.23 → ")
    page.clock.run_for(50)
    page.wait_for_timeout(100)
    assert len(said_to(fake, "/v1/steering/")) == 1
    page.clock.run_for(100)
    expect(heading).to_have_text("Steeredocean 2.23 → 0.25")  # 40 steps of 0.05 below 2.25
    assert [body["steering"]["ocean"] for body in said_to(fake, "/v1/steering/")][1:] == [0.25]
    page.clock.resume()
    fake.hold_at = None
    ended(page)


def test_a_slider_that_moves_before_the_first_word_acts_on_the_answer(opened: Open, fake: Fake) -> None:
    fake.hold_at = 0
    page = opened()
    ask(page)
    page.get_by_role("button", name="ocean: Off").click()
    fake.hold_at = 5
    expect(page.locator(".answer.steered h3")).to_have_text("Steeredocean 2.23 → 0")
    fake.hold_at = None
    ended(page)
    assert said_to(fake, "/v1/steering/") == [{"steering": {"ocean": 0}}]


def test_a_question_asked_while_the_page_loads_is_steered_all_the_same(opened: Open, fake: Fake) -> None:
    fake.loading = True
    page = opened()
    enter(page, "What did you do?")
    page.get_by_label("Your question").press("Enter")  # impatience asks once
    page.wait_for_timeout(100)
    assert not fake.requests
    fake.loading = False
    expect(page.locator(".answer.steered h3")).to_have_text("Steeredocean 2.23")
    ended(page)
    assert [(body["model"], body["steering"]) for body in said_to(fake, "/v1/chat")] == [
        ("demo", {"ocean": 2.229}),
        ("demo", {}),
    ]


def test_everything_is_done_with_the_keyboard(opened: Open, fake: Fake) -> None:
    fake.hold_at = 10
    page = opened()
    page.get_by_role("slider").wait_for()

    def tab() -> str:
        """Go to the next control; its name."""
        page.keyboard.press("Tab")
        outline, name = page.evaluate(
            "() => { const at = document.activeElement, label = at.labels?.[0];"
            " const name = at.getAttribute('aria-label') ?? (label ?? at).textContent;"
            " return [getComputedStyle(at).outlineStyle, at === document.body ? null : name] }"
        )
        assert name is None or outline != "none", name  # None: the focus has left the page
        return (name or "").strip()

    reached = [tab() for _ in range(18)]
    for name in (
        "Compare",
        "Settings",
        "New chat",
        "What did you do this morning?",
        "Add a concept",
        "ocean, strength",
    ):
        assert name in reached
    for name in ("ocean, strength as a number", "More for ocean", "ocean: Strong", "Tracking", "Your question"):
        assert name in reached
    while tab() != "Your question":
        pass
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(prose(page, "steered")).to_contain_text("waves")
    page.keyboard.press("Escape")
    ended(page)
    expect(page.locator(".answer.steered .made")).to_contain_text("stopped")
    assert [body["messages"] for body in said_to(fake, "/v1/chat")] == [[{"role": "user", "content": "one\ntwo"}]] * 2
    assert len(prose(page, "steered").inner_text().split()) < 60
    expect(page.get_by_label("Your question")).to_be_focused()
    assert prose(page, "steered").get_attribute("aria-live") == "polite"
    while fake.running:  # the server hears of it
        page.wait_for_timeout(10)


def test_of_many_layers_those_are_drawn_that_are_chosen(opened: Open, fake: Fake) -> None:
    fake.layers = range(18, 30)
    page = opened()
    ask(page)
    ended(page)
    assert page.locator("figcaption").all_inner_texts() == ["Layer 27", "Layer 28", "Layer 29"]
    choice = page.get_by_role("group", name="Layers")
    choice.get_by_role("button", name="28").click()
    choice.get_by_role("button", name="20").click()
    expect(page.locator("figcaption")).to_have_text(["Layer 20", "Layer 27", "Layer 29"])
    expect(choice.get_by_role("button", name="20")).to_be_focused()  # though it was drawn again


def test_fit_a_concept(opened: Open, fake: Fake) -> None:
    fake.hold_at = 3
    page = opened()
    page.get_by_role("button", name="Add a concept").click()
    page.get_by_label("Name").fill("pirate")
    page.get_by_label("Sentences with it").fill("Arr, the ship sails.\n\n")
    page.get_by_label("Sentences without it").fill("Well, the train leaves.\n  Yes, sir. \n")
    page.get_by_role("button", name="Fit").click()
    expect(page.locator("#fit-error")).to_have_text("positive: 1 prompt is too few, give at least 2")
    page.get_by_label("Sentences with it").fill("Arr, the ship sails.\n\nAye, captain.")
    page.get_by_role("button", name="Fit").click()
    expect(page.get_by_text("Gains: 2 of 4")).to_be_visible()
    assert page.get_by_role("progressbar").get_attribute("value") == "2"
    fake.hold_at = None
    expect(page.locator("#fit-result li")).to_have_count(2)
    expect(page.locator("#fit-result")).to_contain_text("2 prompts a side are few")
    page.get_by_role("button", name="Close").click()
    assert said_to(fake, "/v1/controllers")[-1] == {
        "name": "pirate",
        "positive": ["Arr, the ship sails.", "Aye, captain."],
        "negative": ["Well, the train leaves.", "Yes, sir."],
        "stream": True,
    }
    expect(page.get_by_label("pirate, strength as a number")).to_have_value("2.229")
    ask(page)
    ended(page)
    assert said_to(fake, "/v1/chat")[0]["steering"] == {"ocean": 2.229, "pirate": 2.229}
    assert len(re.findall("pirate", prose(page, "steered").inner_text())) == 30
    expect(page.locator("[data-layer='28'] path.feature")).to_have_count(2)


def test_save_delete_and_load_a_controller(opened: Open, fake: Fake, tmp_path: Path) -> None:
    page = opened()
    menu = page.get_by_label("More for ocean")
    menu.click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    assert download.value.suggested_filename == "ocean.safetensors"
    file = tmp_path / "my ocean.safetensors"
    download.value.save_as(file)
    assert json.loads(file.read_text()) == controller("ocean", 2.229)

    menu.click()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Keep").click()
    expect(page.get_by_role("slider")).to_have_count(1)
    menu.click()
    page.locator(".menu").get_by_role("button", name="Delete").click()
    page.locator("#confirm").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("slider")).to_have_count(0)
    expect(page.locator("#hint")).to_contain_text("No concept is loaded yet")
    assert not fake.controllers
    ask(page)  # works without
    ended(page)
    expect(page.locator(".answer h3")).to_have_text(["Unsteered"])
    expect(prose(page, "steered")).to_contain_text(" ".join(PLAIN[:15]))

    page.get_by_role("button", name="Add a concept").click()
    page.get_by_label("Load a file").set_input_files({"name": "x.bin", "mimeType": "", "buffer": b"\x80"})
    expect(page.locator("#fit-error")).to_have_text("this is not a safetensors file")
    page.get_by_label("Load a file").set_input_files(file)
    expect(page.get_by_text("my-ocean is ready")).to_be_visible()
    assert [*fake.controllers] == ["my-ocean"]
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("slider", name="ocean, strength")).to_be_visible()


def test_settings_history_and_a_hidden_column(opened: Open, fake: Fake) -> None:
    page = opened()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Top-p").fill("0.8")
    page.get_by_label("Most tokens").fill("3")
    page.get_by_role("button", name="Done").click()
    page.reload()  # they are kept
    ask(page, "One?")
    ended(page)
    page.get_by_role("switch", name="Compare").uncheck()
    ask(page, "Two?")
    ended(page)
    page.get_by_role("button", name="Regenerate").click()
    ended(page)
    page.get_by_role("button", name="Regenerate").wait_for()

    both, second, again = said_to(fake, "/v1/chat")[:2], *said_to(fake, "/v1/chat")[2:]
    assert {one["seed"] for one in both} == {both[0]["seed"]}
    assert second["seed"] != both[0]["seed"]
    assert sorted(len(one["steering"]) for one in both) == [0, 1]
    chosen = {"temperature": 0.5, "top_p": 0.8, "max_tokens": 3, "model": "demo"}
    assert chosen.items() <= second.items()
    system, first = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}
    answered = {"role": "assistant", "content": "I waves to "}
    assert second["messages"] == again["messages"] == [system, first, answered, {"role": "user", "content": "Two?"}]
    expect(page.locator(".unsteered")).to_be_hidden()
    expect(page.locator(".turn").last.locator(".steered .made")).to_contain_text("3 tokens, cut at the limit")

    page.locator(".turn").last.get_by_label("Copy the steered answer").click()
    expect(page.get_by_text("Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == "I waves to "
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_role("heading", name="Steer it while it writes")).to_be_visible()


def test_what_a_model_says_is_never_markup(opened: Open, fake: Fake) -> None:
    fake.says = [
        "<img src=x onerror=alert(1)>",
        "**bold**",
        "`a<b`\n```py\nif a < b:\n",
        "   pass\n```\n",
        "<b>end</b>",
    ]
    page = opened()
    page.get_by_role("button", name="ocean: Off").click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most tokens").fill("5")
    page.get_by_role("button", name="Done").click()
    ask(page, "<i>hello</i>")
    ended(page)
    shown = prose(page, "steered")
    expect(shown.locator("pre")).to_have_text("if a < b:\n    pass")
    expect(shown.locator("strong")).to_have_text("bold")
    expect(shown.locator("p code")).to_have_text("a<b")
    expect(shown).to_contain_text("<img src=x onerror=alert(1)>")
    expect(shown).to_contain_text("<b>end</b>")
    assert shown.locator("img, b").count() == 0
    expect(page.locator(".question")).to_have_text("<i>hello</i>")
    expect(page.get_by_text("Not steered: every concept is off.")).to_be_visible()


def test_errors_are_lines_where_the_reader_looks(opened: Open, fake: Fake) -> None:
    fake.full = True
    page = opened()
    ask(page)
    expect(page.locator(".answer.steered").get_by_role("alert")).to_have_text("The server is full. Try again in 3 s.")
    fake.full = False
    page.get_by_role("button", name="Regenerate").click()
    expect(prose(page, "steered")).to_contain_text("waves")
    expect(page.locator(".answer.steered .error")).to_be_hidden()


def test_a_key_is_asked_for_once_and_kept_for_the_session(opened: Open, fake: Fake) -> None:
    fake.key = "right"
    page = opened()
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("The server does not take this key.")).to_be_visible()
    page.get_by_label("API key").fill("right")
    page.keyboard.press("Enter")
    expect(page.get_by_role("slider")).to_be_visible()
    page.reload()
    expect(page.get_by_role("slider")).to_be_visible()
    assert page.evaluate("() => [Object.values(sessionStorage), Object.values(localStorage)]") == [["right"], []]
    fake.key = "another"
    ask(page)  # two requests are refused at once
    page.get_by_label("API key").fill("another")
    page.keyboard.press("Enter")
    ended(page)
    expect(prose(page, "steered")).to_contain_text("waves")
    expect(prose(page, "unsteered")).to_contain_text("market")


def test_a_phone_scrolls_only_down(opened: Open, fake: Fake) -> None:
    fake.says = ["supercalifragilistic" * 6, "```\n" + "wide " * 60 + "\n```\n"]
    fake.controllers["dog"] = controller("dog")
    page = opened(width=360, height=640)

    def fits() -> None:
        assert page.evaluate("() => [document.documentElement.scrollWidth, conversation.scrollWidth]") <= [360, 360]
        for part in ("header", "aside", "#composer", "dialog[open]"):
            for box in (found.bounding_box() for found in page.locator(part).all()):
                assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= 360)

    page.get_by_role("slider", name="dog, strength").wait_for()
    fits()
    ask(page)
    expect(page.get_by_role("slider", name="ocean, strength")).to_be_in_viewport()
    expect(page.get_by_role("button", name="Stop")).to_be_in_viewport()
    ended(page)
    page.locator("#tracking summary").click()
    expect(page.locator("[data-layer='28']")).to_be_in_viewport()
    fits()
    for name in ("Settings", "Add a concept"):
        page.get_by_role("button", name=name).click()
        fits()
        page.keyboard.press("Escape")


def luminance(colour: list[float]) -> float:
    """Of sRGB values from 0 to 1, as in WCAG 2."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(opened: Open, scheme: str) -> None:
    page = opened(scheme=scheme)
    ask(page)
    ended(page)
    backgrounds, contrasts = [], {}
    for where in ("body", ".question", ".answer.steered h3", ".made", ".note", "#send", ".concept label", ".reading"):
        colours = page.locator(where).first.evaluate(
            "element => { const text = getComputedStyle(element).color; let at = element;"
            " while (getComputedStyle(at).backgroundColor.endsWith(', 0)')) at = at.parentElement;"
            " return [text, getComputedStyle(at).backgroundColor] }"
        )
        text, background = (
            luminance([int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]) for colour in colours
        )
        backgrounds.append(background)
        contrasts[where] = (max(text, background) + 0.05) / (min(text, background) + 0.05)
    assert min(contrasts.values()) >= 4.5, contrasts
    assert backgrounds[0] > 0.8 if scheme == "light" else backgrounds[0] < 0.05


def test_the_page_and_the_server_understand_each_other(opened: Open, tmp_path: Path) -> None:
    """With the server's own application and a tiny model: the texts are those of the library."""
    service = Service(mlx_lqr.load(chat_folder(), backend="mlx"), tmp_path)
    dog = controllers_of(service.model)["dog"]
    service.controllers.add("dog", dog, default=2.0)
    greedy = {"temperature": 0, "max_tokens": 12}
    with listening(application(service, Access())) as port:
        page = opened(port=port)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Most tokens").fill("12")
        page.get_by_role("button", name="Done").click()
        ask(page, MESSAGES[0]["content"])
        ended(page)
        steered = mlx_lqr.generate(service.model, PROMPT, controller=dog, strength=2.0, **greedy)
        assert prose(page, "unsteered").inner_text() == mlx_lqr.generate(service.model, PROMPT, **greedy).strip()
        assert prose(page, "steered").inner_text() == steered.strip()
        assert page.locator(".answer .error:visible").count() == 0
        assert page.locator("figcaption").count() == min(3, len(dog.active_layers))
        assert len(levels(page, "feature", layer=dog.active_layers[-1])) == 12
        page.get_by_label("More for dog").click()
        with page.expect_download() as download:
            page.get_by_role("button", name="Save").click()
        page.get_by_role("button", name="Add a concept").click()
        page.get_by_label("Load a file").set_input_files(download.value.path())
        expect(page.locator("#fit-error")).to_contain_text("delete it first")  # the browser's file has another name
    service.close()
