"""The page over the real `mlx_lm.server`, with tiny models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.support.proxy import Proxy


def test_a_model_is_loaded_chatted_with_and_unloaded(
    proxy: Proxy, visit: Callable[..., Any]
) -> None:
    page = visit(proxy, "models")
    row = page.locator("mlx-models .row", has_text="beta")
    row.get_by_role("button", name="Load beta", exact=True).click()
    row.get_by_role("button", name="Chat with beta").click(timeout=60_000)
    page.get_by_role("button", name="System prompt and sampling").click()
    page.get_by_label("Longest answer").fill("12")
    page.get_by_role("button", name="Save").click()
    page.fill("mlx-chat textarea", "Hello!")
    page.keyboard.press("Enter")
    answer = page.locator("mlx-message.assistant")
    answer.locator(".figures", has_text="12 tokens").wait_for()
    assert "beta" in answer.locator("mlx-markdown").last.inner_text()
    page.goto(f"{proxy.url}/#logs")
    page.get_by_label("Which log").select_option("backend")
    page.locator("mlx-logs .log p").first.wait_for()
    page.goto(f"{proxy.url}/#now")
    page.get_by_role("button", name="Unload tiny/beta").click()
    page.get_by_text("No model is loaded.").wait_for()
    assert not proxy.loaded()["loaded"]
