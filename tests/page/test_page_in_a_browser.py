"""The page as a person uses it, in a real browser, over the scripted stand-in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from mlxproxy.observability.events import FOLLOWERS_OF_ONE
from tests.page.conftest import Site
from tests.support import scripted_server
from tests.support.proxy import Proxy
from tests.support.waiting import until

Visit = Callable[..., Any]
KEY = "key-of-alice"
LAST = "mlx-message.assistant:last-of-type"


def say(page: Any, text: str) -> None:
    page.fill("mlx-chat textarea", text)
    page.keyboard.press("Enter")


def finished(page: Any) -> Any:
    """Return the last answer, once it has ended."""
    page.wait_for_selector(f"{LAST} .figures:not(:empty)")
    return page.locator(LAST)


def there_are(number: int, found: Any) -> None:
    """Wait until there are that many."""
    until(lambda: found.count() == number, what=f"{number} of {found}")


# -- models


def test_models_are_loaded_and_unloaded_and_the_page_says_what_happens(
    site: Site, visit: Visit
) -> None:
    page = visit(site.proxy, "models")
    row = page.locator("mlx-models .row", has_text="beta")
    site.script(load_seconds=1.5)
    row.get_by_role("button", name="Load beta", exact=True).click()
    row.locator("progress").wait_for()
    row.locator(".badge", has_text="loaded").wait_for()
    assert site.proxy.loaded()["id"] == "tiny/beta"
    row.get_by_role("button", name="Unload beta").click()
    row.get_by_role("button", name="Load beta", exact=True).wait_for()
    assert not site.proxy.loaded()["loaded"]


def test_a_load_is_given_its_options(site: Site, visit: Visit) -> None:
    page = visit(site.proxy, "models")
    page.get_by_role("button", name="Load beta with options").click()
    page.get_by_label("Unload when unused for").select_option("30m")
    page.get_by_label("Pin it").check()
    page.get_by_role("dialog").get_by_role("button", name="Load", exact=True).click()
    until(lambda: site.proxy.loaded().get("id") == "tiny/beta", what="the load")
    options = site.proxy.loaded()["options"]
    assert (options["ttl"], options["pin"]) == (1800, True)
    assert site.proxy.unload().ok


def test_a_load_under_way_can_be_cancelled(site: Site, visit: Visit) -> None:
    site.script(load_seconds=60.0)
    page = visit(site.proxy, "models")
    page.get_by_role("button", name="Load beta", exact=True).click()
    page.get_by_role("button", name="Cancel the load of beta").click()
    page.get_by_role("button", name="Load beta", exact=True).wait_for()
    until(lambda: site.proxy.loaded()["transition"] is None, what="the end of the load")
    assert site.proxy.loaded().get("id") != "tiny/beta"


def test_a_model_that_cannot_be_loaded_shows_its_reason(site: Site, visit: Visit) -> None:
    page = visit(site.proxy, "models")
    page.get_by_text("2 models can be loaded, 1 cannot.").wait_for()
    page.get_by_label("Which models").select_option("not")
    row = page.locator("mlx-models .row")
    assert "unheard_of" in row.inner_text()
    assert row.get_by_role("button").count() == 0


def test_search_and_order_find_a_model(site: Site, visit: Visit) -> None:
    page = visit(site.proxy, "models")
    names = page.locator("mlx-models .row h2")
    page.get_by_label("Order").select_option("name")
    there_are(2, names)
    assert ["alpha" in names.nth(0).inner_text(), "beta" in names.nth(1).inner_text()] == [True] * 2
    page.get_by_label("Search models").fill("BET tiny")
    there_are(1, names)
    assert "beta" in names.inner_text()
    page.get_by_label("Search models").fill("nothing like it")
    page.get_by_text("No model matches").wait_for()


def test_a_load_that_fails_is_told_in_words(site: Site, visit: Visit) -> None:
    site.script(models={"beta": {"load_failure": "ValueError: bad weights"}})
    page = visit(site.proxy, "models")
    page.get_by_role("button", name="Load beta", exact=True).click()
    page.locator(".toast.bad").wait_for()
    page.goto(f"{site.proxy.url}/#now")
    page.locator("section", has_text="Last failures").get_by_text("bad weights").first.wait_for()


# -- now


def test_who_is_served_is_shown_and_one_answer_can_be_ended(site: Site, visit: Visit) -> None:
    site.script(events=600, interval=0.1)
    page = visit(site.proxy, "now")
    streams = [site.proxy.chat(stream=True, max_tokens=600) for _ in range(2)]
    lines = [stream.iter_lines() for stream in streams]
    served = page.locator("table.served tbody tr")
    there_are(2, served)
    assert "/v1/chat/completions" in served.first.inner_text()
    assert "alpha" in served.first.inner_text()
    tokens = served.first.locator("td").nth(4)
    until(lambda: int(tokens.inner_text()) > 3, what="a fourth token")
    page.get_by_text("2 answers in flight").wait_for()
    served.first.get_by_role("button", name="End the answer").click()
    there_are(1, served)
    assert b"answer_ended" in b"".join(lines[0]), "the oldest is the first of the table"
    streams[1].close()
    page.get_by_text("Nobody is waiting for an answer.").wait_for()


def test_memory_speed_and_time_to_first_token_are_shown(site: Site, visit: Visit) -> None:
    site.script(events=25, interval=0.1)
    page = visit(site.proxy, "now")
    page.locator(".memory strong", has_text=re.compile(r"of .*GB")).wait_for()
    site.proxy.chat(max_tokens=25)
    page.wait_for_selector(".curve path.line")
    page.locator(".curve path.dots[d^='M']").wait_for(state="attached")
    assert re.search(r"[\d.]+ tokens/s", page.locator(".curve").first.inner_text())


# -- chat


def test_an_answer_is_streamed_with_its_figures_and_thoughts_are_folded(
    site: Site, visit: Visit
) -> None:
    site.script(text="It is **Paris**.\n\n```py\nprint('hi')\n```", thoughts=3, interval=0.04)
    page = visit(site.proxy, "chat")
    say(page, "What is the capital of France?")
    answer = finished(page)
    assert answer.locator("strong").inner_text() == "Paris"
    assert answer.locator("pre code").inner_text() == "print('hi')"
    assert "tokens/s" in answer.locator(".figures").inner_text()
    thoughts = answer.locator("details.thinking")
    assert not thoughts.get_by_text("thought0").is_visible()
    thoughts.locator("summary").click()
    assert thoughts.get_by_text("thought0").is_visible()


def test_an_answer_can_be_stopped_asked_again_and_its_question_edited(
    site: Site, visit: Visit
) -> None:
    site.script(events=600, interval=0.05)
    page = visit(site.proxy, "chat")
    say(page, "Count.")
    page.locator(LAST).get_by_text("alpha3").wait_for()
    page.get_by_role("button", name="Stop the answer").click()
    assert "stopped" in finished(page).locator(".figures").inner_text()
    ended = scripted_server.record(site.program, "finished")
    until(
        lambda: scripted_server.record(site.program, "finished")[-1]["how"] == "client_gone",
        what=f"the backend's end after {len(ended)}",
    )
    site.script(text="Again.")
    page.get_by_role("button", name="Ask again", exact=True).click()
    page.locator(LAST).get_by_text("Again.").wait_for()
    finished(page)
    site.script(text="Edited.")
    page.locator("mlx-message.user").hover()
    page.get_by_role("button", name="Edit and ask again").click()
    page.get_by_role("dialog").get_by_label("Message").fill("Count to three.")
    page.get_by_role("dialog").get_by_role("button", name="Ask again").click()
    page.locator(LAST).get_by_text("Edited.").wait_for()
    assert page.locator("mlx-message").count() == 2
    body = scripted_server.record(site.program, "request")[-1]["body"]
    assert [message["content"] for message in body["messages"]] == ["Count to three."]


def test_system_prompt_and_sampling_are_sent(site: Site, visit: Visit) -> None:
    page = visit(site.proxy, "chat")
    page.get_by_role("button", name="System prompt and sampling").click()
    page.get_by_role("textbox", name="System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Longest answer").fill("4")
    page.get_by_role("button", name="Save").click()
    say(page, "Hello")
    finished(page)
    body = scripted_server.record(site.program, "request")[-1]["body"]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"]) == (0.3, 4)


def test_conversations_stay_in_that_browser(site: Site, visit: Visit) -> None:
    page = visit(site.proxy, "chat")
    say(page, "The first conversation")
    finished(page)
    page.get_by_role("button", name="New conversation").first.click()
    say(page, "The second conversation")
    finished(page)
    page.reload()
    listed = page.locator(".conversations li")
    there_are(2, listed)
    listed.get_by_role("button", name="The first conversation", exact=True).click()
    page.locator("mlx-message.user", has_text="The first conversation").wait_for()
    listed.filter(has_text="The first").hover()
    page.get_by_role("button", name="Delete “The first conversation”").click()
    page.locator("mlx-message.user", has_text="The second conversation").wait_for()
    other = visit(site.proxy, "chat")
    other.get_by_text("Nothing leaves this machine").wait_for()
    assert other.locator(".conversations li").count() == 0


def test_a_swap_during_a_chat_is_told(site: Site, visit: Visit) -> None:
    page = visit(site.proxy, "chat")
    site.script(load_seconds=4.0)
    page.get_by_label("Model", exact=True).select_option("tiny/beta")
    page.get_by_text("beta is not loaded: your message loads it").wait_for()
    say(page, "Hello")
    page.locator(LAST).get_by_text(re.compile("Loading tiny/beta")).wait_for()
    assert "beta" in finished(page).locator(".figures").inner_text()


def test_an_answer_that_fails_keeps_what_came_and_says_why(site: Site, visit: Visit) -> None:
    site.script(events=20, die_after=5)
    page = visit(site.proxy, "chat")
    say(page, "Hello")
    answer = finished(page)
    assert "alpha4" in answer.inner_text()
    assert answer.locator(".problem").inner_text()
    site.script(text="Now it works.")
    answer.get_by_role("button", name="Try again").click()
    page.locator(LAST).get_by_text("Now it works.").wait_for()


def test_images_can_only_be_attached_for_a_model_that_sees(site: Site, visit: Visit) -> None:
    page = visit(site.proxy, "chat")
    page.get_by_label("Model", exact=True).locator("option").first.wait_for(state="attached")
    assert not page.locator("mlx-chat .attach").is_visible()
    # The same list, but of models that see.
    seeing = requests.get(f"{site.proxy.url}/v1/models?all=true", timeout=10).json()
    for model in seeing["data"]:
        model["capabilities"]["vision"] = True
    page.route("**/v1/models?all=true", lambda route: route.fulfill(json=seeing))
    sent: list[Any] = []

    def answered(route: Any) -> None:
        sent.append(route.request.post_data_json)
        route.fulfill(content_type="text/event-stream", body="data: [DONE]\n\n")

    page.route("**/v1/chat/completions", answered)
    page.reload()
    page.locator("mlx-chat .attach").wait_for()
    pixel = bytes.fromhex(
        "47494638396101000100800000000000ffffff21f90401000000002c00000000010001000002024401003b"
    )
    page.locator("mlx-chat input[type=file]").set_input_files(
        {"name": "pixel.gif", "mimeType": "image/gif", "buffer": pixel}
    )
    page.get_by_alt_text("Image 1").wait_for()
    say(page, "What is this?")
    until(lambda: bool(sent), what="the request")
    image, text = sent[0]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/gif;base64,R0lGODlh")
    assert text == {"type": "text", "text": "What is this?"}


# -- what a model writes


HOSTILE = [
    "<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    "<svg onload=window.ran=1><animate onbegin=window.ran=1></svg>",
    "[a](javascript:window.ran=1) [b](JaVaScRiPt:window.ran=1) [c](\tjavascript:window.ran=1)",
    "[d](data:text/html,<script>window.ran=1</script>) [e](vbscript:x) [f](file:///etc/passwd)",
    "[g](java\nscript:window.ran=1) <javascript:window.ran=1> [h](&#106;avascript:window.ran=1)",
    "![i](http://203.0.113.1/spy.png) ![j](data:image/svg+xml,<svg onload=window.ran=1>)",
    "<iframe srcdoc='<script>parent.ran = 1</script>'></iframe><base href='//evil.example'>",
    "<style>* { display: none }</style><link rel=stylesheet href=//evil.example/x.css>",
    "<form action=//evil.example><button formaction=javascript:window.ran=1>x</button></form>",
    '```html" onmouseover="window.ran=1\n<script>window.ran = 1</script>\n```',
    '| <img src=x onerror=window.ran=1> | "onclick="window.ran=1 |\n|---|---|\n| <b>x</b> | y |',
    "# <script>window.ran=1</script>\n> <object data=javascript:window.ran=1>\n- <embed src=x>",
    "**<script>window.ran=1</script>** `</code><script>window.ran=1</script>`",
    '[k](https://example.org/"onmouseover="window.ran=1) https://example.org/"onload=window.ran=1',
    "<mlx-app></mlx-app><mlx-chat></mlx-chat><template shadowrootmode=open>x</template>",
    "]]><!--<script>--><![CDATA[<script>window.ran=1</script>]]>",
    "\u202ereversed\u202c \u0000 \ufeff &lt;script&gt;window.ran=1&lt;/script&gt;",
]
ALLOWED = set(
    "MLX-MARKDOWN P BR A STRONG EM DEL CODE PRE FIGURE FIGCAPTION SPAN BUTTON SVG PATH H3 H4 H5 H6 "
    "HR BLOCKQUOTE UL OL LI DIV TABLE THEAD TBODY TR TH TD".split()
)


def test_nothing_that_a_model_writes_runs_or_is_fetched(site: Site, visit: Visit) -> None:
    page = visit(site.proxy, "chat")
    page.locator("body[data-phase=live]").wait_for()
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    site.script(text="\n\n".join(HOSTILE))
    say(page, "Say something dangerous.")
    answer = finished(page)
    found = answer.locator("mlx-markdown").last.evaluate(
        "node => [node, ...node.querySelectorAll('*')].map(each => ({"
        " tag: each.tagName.toUpperCase(), text: each.localName === 'a' ? each.href : '',"
        " names: each.getAttributeNames() }))"
    )
    assert {each["tag"] for each in found} <= ALLOWED
    names = {name for each in found for name in each["names"]}
    assert not any(name.startswith("on") for name in names)
    assert names.isdisjoint({"src", "srcdoc", "style", "action", "formaction", "id"})
    links = [each["text"] for each in found if each["tag"] == "A"]
    assert links
    assert all(link.startswith(("https://", "http://", "mailto:")) for link in links)
    shown = answer.inner_text()
    for text in ("<script>window.ran = 1</script>", "<iframe srcdoc=", "<style>"):
        assert text in shown, "it is shown as it was written"
    for link in answer.locator("a").all():
        link.hover()
    assert page.evaluate("window.ran") is None
    assert all(url.startswith(site.proxy.url) for url in fetched)
    assert page.locator("mlx-app").count() == 1


SLOW = {
    "stars": "*a" * 40_000,
    "brackets": "[" * 1_000_000 + "](" + "x",
    "backticks": "".join("`" * (n % 50) + " " for n in range(4000)),
    "quotes": ">" * 40_000,
    "lists": "\n".join(" " * n + "- x" for n in range(400)),
    "pipes": "|" * 20_000 + "\n" + "|-" * 20_000,
    "dots": "https://a" + "." * 40_000,
    "underscores": "_ __" * 20_000,
    "angles": "<" * 1_000_000 + ">",
    "spaces": "# " + " " * 40_000 + "x",
}


def test_no_text_makes_the_page_slow_or_deep(site: Site, visit: Visit) -> None:
    """Twice the text is about twice the work, whatever the text is (hours, if it were squared)."""
    page = visit(site.proxy, "chat")
    for name, text in SLOW.items():
        took, depth = page.evaluate(
            "text => { const node = document.createElement('mlx-markdown');"
            " const began = performance.now(); node.text = text;"
            " let depth = 0; for (let at = node; at; at = at.lastElementChild) depth += 1;"
            " return [performance.now() - began, depth]; }",
            text,
        )
        assert took < 3000, (name, took)
        assert depth < 60, name


# -- keys, restarts, large libraries, phones


def test_with_a_key_the_page_asks_for_it_and_keeps_it_in_that_browser(
    site: Site, visit: Visit, tmp_path: Path
) -> None:
    models = Path(site.proxy.environment["MLXPROXY_MODELS_ROOT"])
    proxy = Proxy(tmp_path / "keyed", models, MLX_SERVER_BIN=site.program, API_KEY=KEY)
    try:
        proxy.start()
        page = visit(proxy, "models", allowed=("401", "ERR_"))
        key = page.get_by_role("dialog").get_by_label("Key")
        key.fill("key-of-nobody")
        page.get_by_role("button", name="Use this key").click()
        page.get_by_text("This key is not valid here.").wait_for()
        assert page.locator("mlx-models .row").count() == 0
        key.fill(KEY)
        key.press("Enter")
        page.locator("mlx-models .row").first.wait_for()
        page.get_by_text("Connected", exact=True).wait_for()
        page.reload()
        page.locator("mlx-models .row").first.wait_for()
        assert page.get_by_role("dialog").count() == 0
        assert page.context.cookies() == []
        page.goto(f"{proxy.url}/#connect")
        page.locator("mlx-connect summary", has_text="curl").click()
        assert KEY not in page.content(), "over a shoulder, nobody reads it"
        stranger = visit(proxy, "models", allowed=("401", "ERR_"))
        stranger.get_by_role("dialog").wait_for()
        assert KEY not in (proxy.instance / "logs" / "proxy.log").read_text()
    finally:
        proxy.clean_up()


def test_the_page_survives_a_restart_of_the_proxy_and_is_right_afterwards(
    site: Site, visit: Visit, tmp_path: Path
) -> None:
    models = Path(site.proxy.environment["MLXPROXY_MODELS_ROOT"])
    proxy = Proxy(tmp_path / "restarted", models, MLX_SERVER_BIN=site.program)
    try:
        proxy.start()
        assert proxy.load("tiny/alpha").ok
        page = visit(proxy, "now", allowed=("ERR_",))
        page.locator("mlx-now .row", has_text="alpha").wait_for()
        proxy.stop()
        page.get_by_text("No connection. Trying again").wait_for()
        proxy.start()
        assert proxy.load("tiny/beta").ok
        page.get_by_text("Connected", exact=True).wait_for()
        page.locator("mlx-now .row", has_text="beta").wait_for()
        assert page.locator("mlx-now .row", has_text="alpha").count() == 0
        assert page.get_by_text("has been updated").count() == 0
        page.route(f"{proxy.url}/", lambda route: route.fulfill(headers={"ETag": '"another"'}))
        proxy.stop()
        page.get_by_text("No connection. Trying again").wait_for()
        proxy.start()
        page.get_by_text("mlxproxy has been updated. Reload this page.").wait_for()
    finally:
        proxy.clean_up()


def test_after_a_gap_the_page_shows_what_is_so(site: Site, visit: Visit) -> None:
    """The proxy says that events are lost; what it then sends is the truth."""
    page = visit(site.proxy, "now")
    page.locator("mlx-now .row", has_text="alpha").wait_for()
    told = requests.get(f"{site.proxy.url}/v1/events?follow=false", timeout=10).json()
    stale = {**told, "models": [], "answers": [{"name": "x", "path": "/stale", "client": "?"}]}
    lines = [("snapshot", stale), ("lost", {"count": 9}), ("snapshot", told)]
    body = "".join(f"event: {kind}\ndata: {json.dumps(data)}\n\n" for kind, data in lines)
    page.route(
        "**/v1/events?figures=true",
        lambda route: route.fulfill(content_type="text/event-stream", body=body),
    )
    page.reload()
    page.locator("mlx-now .row", has_text="alpha").wait_for()
    assert page.get_by_text("/stale").count() == 0


MANY = 2000


def test_two_thousand_models_are_shown_and_searched_at_once(
    site: Site, visit: Visit, tmp_path: Path
) -> None:
    listing = requests.get(f"{site.proxy.url}/v1/models?all=true", timeout=10).json()
    example = next(it for it in listing["data"] if it["loadable"])
    listing["data"] = [{**example, "id": f"many/model-{n}"} for n in range(MANY)]
    page = visit(site.proxy, "logs")
    page.route("**/v1/models?all=true", lambda route: route.fulfill(json=listing))
    page.goto(f"{site.proxy.url}/#models")
    page.reload()
    page.get_by_text("2,000 models can be loaded.").wait_for()
    drawn = page.locator("mlx-models .row").count()
    assert drawn < MANY / 5, "only what can be seen is drawn"
    page.locator("mlx-models .more").scroll_into_view_if_needed()
    until(lambda: page.locator("mlx-models .row").count() > drawn, what="more rows")
    page.get_by_label("Search models").fill("model-1999")
    there_are(1, page.locator("mlx-models .row"))


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_part_is_wider_than_the_screen(site: Site, visit: Visit, width: int) -> None:
    page = visit(site.proxy, viewport={"width": width, "height": 700})
    for part in ("now", "models", "chat", "logs", "connect"):
        page.goto(f"{site.proxy.url}/#{part}")
        page.locator(f"mlx-{part} :is(.row, .box, .log p, details)").first.wait_for()
        if part == "connect":
            page.locator("mlx-connect summary").nth(1).click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), part
        view = page.locator(".view:not([hidden])")
        assert view.evaluate("view => view.scrollWidth <= view.clientWidth"), part


def test_everything_can_be_reached_by_keyboard(site: Site, visit: Visit) -> None:
    page = visit(site.proxy, "now")
    page.locator("mlx-now .row").first.wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('mlx-now') !== null")
    focused = page.evaluate_handle("document.activeElement")
    page.wait_for_timeout(1500)  # it is drawn anew each second
    assert page.evaluate("node => document.activeElement === node", focused)


def test_a_page_too_many_says_what_to_do(site: Site, visit: Visit) -> None:
    followers: list[requests.Response] = []

    def follow() -> bool:
        """Open another one; the pages of earlier tests may still be counted."""
        stream = requests.get(f"{site.proxy.url}/v1/events", stream=True, timeout=20)
        followers.extend([stream] if stream.ok else [])
        return len(followers) == FOLLOWERS_OF_ONE

    until(follow, what="as many followers as there may be")
    page = visit(site.proxy, "now", allowed=("429",))
    page.get_by_text("Close one of yours first.").wait_for()
    for follower in followers:
        follower.close()
    page.locator("mlx-now .row", has_text="alpha").wait_for()


# -- logs and clients


def test_the_log_is_followed_filtered_and_paused(site: Site, visit: Visit) -> None:
    page = visit(site.proxy, "logs")
    lines = page.locator("mlx-logs .log")
    lines.locator("p").first.wait_for()
    mark = {"X-Request-Id": "seen-on-the-page"}
    requests.get(f"{site.proxy.url}/v1/models", headers=mark, timeout=10)
    lines.get_by_text("seen-on-the-page").wait_for()
    page.get_by_label("Show lines with").fill("seen-on")
    there_are(1, lines.locator("p"))
    page.get_by_label("Show lines with").fill("")
    page.get_by_role("button", name="Pause").click()
    requests.get(f"{site.proxy.url}/v1/models", headers={"X-Request-Id": "later"}, timeout=10)
    page.get_by_role("button", name=re.compile(r"Follow \(\d+ new\)")).wait_for()
    assert lines.get_by_text("id=later").count() == 0
    page.get_by_role("button", name="Follow").click()
    lines.get_by_text("id=later").wait_for()
    page.get_by_label("Which log").select_option("backend")
    lines.get_by_text("Starting httpd").first.wait_for()


def test_the_lines_for_a_client_can_be_copied(site: Site, visit: Visit) -> None:
    page = visit(site.proxy, "connect", permissions=["clipboard-read", "clipboard-write"])
    page.locator("mlx-connect summary", has_text="curl").click()
    page.get_by_role("button", name="Copy the lines for curl").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert f"{site.proxy.url}/v1/chat/completions" in copied
    assert '"model": "tiny/alpha"' in copied
    page.get_by_text("Only this machine can reach the server").wait_for()
