"""llama-server's own page, which is built with it where there is npm: somebody opens it and chats."""

import json
import re

import pytest

from turboquant_gguf.llamacpp import provenance, server
from turboquant_gguf.llamacpp.cachetypes import CacheTypes

QUESTION = "Say hello."
TIMEOUT = 60_000  # milliseconds


@pytest.fixture
def chat(browser, smollm2):
    """The page of a server with turbo caches, opened, with what its console said of errors."""
    if not provenance.built()["web_page"]:
        pytest.skip("this build of llama-server has no web page: there was no npm, or no network for it")
    types = CacheTypes("turbo4", "turbo3")
    with server.running(smollm2, types, context=1024, extra_args=("--ui", "--parallel", "1", "--temp", "0")) as running:
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(running.url)
        yield page, errors
        page.close()


def test_chat(chat):
    """What the server answers is what the page shows."""
    page, errors = chat
    page.get_by_role("textbox").fill(QUESTION)
    with page.expect_response(lambda response: response.url.endswith("/v1/chat/completions")) as answered:
        page.keyboard.press("Enter")
    events = re.findall(r"^data: (\{.*)", answered.value.body().decode(), re.MULTILINE)
    pieces = [choice["delta"].get("content") or "" for event in events for choice in json.loads(event)["choices"]]
    assert len(events) > 2
    first_words = re.findall(r"\w+", "".join(pieces))[:8]
    page.locator("body", has_text=re.compile(r"\W+".join(first_words))).wait_for()
    assert QUESTION in page.inner_text("body") and not errors
