"""`llm-comply`, which holds answers against the published schemas of three APIs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

from tools.clients.houses import Houses
from tools.clients.installation import Installation

PACKAGE = "llm-comply"
FORMATS = {"openai-chat": "Chat", "open-responses": "Responses", "anthropic": "Messages"}
CALLS = [{"name": "get_weather", "arguments": {"location": "Paris"}}]
# Where it is right that a test fails.
KNOWN = {
    "image-input": "text models take no images",
    "error-handling": "a request without a model is answered by the loaded one",
    "compact": "compaction is not offered",
    "streaming": "its list of events lacks `response.reasoning_summary_text.*`, which its own "
    "specification has",
}


def compliance(houses: Houses, installation: Installation) -> Iterator[str]:
    """Yield a line on each API: how many tests passed, and why others did not."""
    version = installation.version("python", PACKAGE)
    if version is None:
        return
    houses.script(calls=CALLS)
    houses.scripted.load("tiny/alpha")
    for format_, api in FORMATS.items():
        url = f"{houses.scripted.url}/v1"
        where = ["--format", format_, "-u", url, "-k", "none", "-m", "tiny/alpha"]
        command = [str(installation.program("python", PACKAGE)), "--json", *where]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        yield f"- `{PACKAGE}` {version}, {api}: {_told(json.loads(done.stdout))}"


def _told(report: dict[str, Any]) -> str:
    ran = [test for test in report["results"] if test["status"] != "skipped"]
    failed = [test for test in ran if test["status"] != "passed"]
    said = f"{len(ran) - len(failed)} of {len(ran)} tests passed"
    reasons = {}
    for test in failed:
        name = str(test["id"])
        known = (reason for part, reason in KNOWN.items() if part in name)
        reasons[name] = next(known, " ".join(map(str, test.get("errors") or ["failed"])))[:300]
    return "; ".join((said, *(f"`{name}`: {reason}" for name, reason in reasons.items()))) + "."
