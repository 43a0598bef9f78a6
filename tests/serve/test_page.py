"""The page at /, in headless Chromium."""

import os
import shutil

import pytest

from tests.serve.conftest import KEYS, MODEL, make_test_engine, running, settings

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the machine")
SCREENSHOT = os.environ.get("MEGALODON_SCREENSHOT", "")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # Root, as in containers, has no sandbox.
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        with started.chromium.launch(**options) as browser:
            yield browser


@pytest.fixture
def page(browser):
    with browser.new_page(viewport={"width": 1000, "height": 760}) as page:
        errors = []
        page.on("pageerror", lambda error: errors.append(error))
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.set_default_timeout(30_000)
        page.requests = requests
        yield page
        assert not errors


def send(page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def wait_for_end(page, turns: int) -> str:
    page.wait_for_function(
        "n => document.querySelectorAll('.turn').length === n"
        " && !document.querySelector('.turn.running')",
        arg=turns,
    )
    return page.locator(".turn").last.locator("span").text_content()


def test_a_conversation_with_a_key_typed_in(server, client, page):
    page.goto(server.address)
    page.wait_for_function(
        "() => document.getElementById('status').textContent === 'type the API key'"
    )
    send(page, "Hello")
    page.wait_for_selector(".turn.error")
    assert "API key is missing" in page.locator(".turn.error").text_content()
    page.fill("#key", KEYS[1])
    page.dispatch_event("#key", "change")
    page.wait_for_function(f"() => document.getElementById('model').textContent === '{MODEL}'")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "24")
    page.click("#reset")
    send(page, "Hello")
    first = wait_for_end(page, 2)
    send(page, "More")
    second = wait_for_end(page, 4)
    if SCREENSHOT:
        page.screenshot(path=SCREENSHOT)
    # The same turns through the API.
    session = "new"
    for content, shown in (("Hello", first), ("More", second)):
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content}], max_tokens=24,
            temperature=0, extra_body={"session": session},
        )  # fmt: skip
        session = answer.session
        assert answer.choices[0].message.content == shown
    assert all(url.startswith((server.address, "data:")) for url in page.requests)


def test_stop_and_plain_text(tiny_model, page):
    engine = make_test_engine(tiny_model)
    with running(engine, settings(chat_template="", max_answer_tokens=100_000)) as server:
        page.goto(server.address)
        page.wait_for_function("() => document.getElementById('mode').value === 'text'")
        page.fill("#max_tokens", "100000")
        page.fill("#temperature", "1.5")
        send(page, "<b>not bold</b>")
        page.wait_for_function(
            "() => document.querySelector('.turn.running span')?.textContent.length > 5"
        )
        page.click("#stop")
        wait_for_end(page, 2)
        assert "stopped" in page.locator("#status").text_content()
        assert page.locator(".turn.user").text_content() == "<b>not bold</b>"
        for _ in range(400):
            if server.thread.num_running == 0:
                break
            page.wait_for_timeout(25)
        assert server.thread.num_running == 0
        page.fill("#max_tokens", "5")
        send(page, "again")
        wait_for_end(page, 4)
        assert page.locator(".turn.error").count() == 0
