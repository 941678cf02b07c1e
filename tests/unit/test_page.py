"""The page as it is served: what it may do, what it needs, and that nothing of it is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask.testing import FlaskClient
from setuptools import Distribution

from mlxproxy.blueprints import addresses
from mlxproxy.blueprints.app import create_app
from mlxproxy.blueprints.auth import Access
from mlxproxy.observability.answers import Answers, UnderWay
from mlxproxy.observability.events import EventBus
from mlxproxy.observability.metrics import Metrics
from mlxproxy.relay.statistics import AnswerStats
from mlxproxy.settings import Settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "mlxproxy" / "page"
SOURCES = {file.name: file.read_text() for file in sorted(FOLDER.iterdir())}
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
KEY = "key-of-alice"
LARGEST_BYTES = 150_000  # of the whole page


@pytest.fixture
def client() -> FlaskClient:
    """A client of an application that has a key."""
    parts: Any = SimpleNamespace(
        settings=Settings(instance_path=Path("/nowhere")),
        access=Access(keys=(KEY,)),
        catalog=SimpleNamespace(models=lambda: [], is_complete=lambda: True),
        controller=SimpleNamespace(current=lambda: None),
        bus=EventBus(),
        metrics=Metrics(),
        answers=Answers(),
    )
    return create_app(parts).test_client()


def files(client: FlaskClient) -> list[str]:
    """Return the paths of the files that the document names."""
    document = client.get("/", headers={"Accept": BROWSER}).text
    return re.findall(r'(?:href|src)="(/page/[^"]+)"', document)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (BROWSER, "text/html"),
        ("*/*", "text/plain"),
        (None, "text/plain"),
        ("text/plain", "text/plain"),
        ("application/json", "application/json"),
        ("application/json, text/html;q=0.5", "application/json"),
    ],
)
def test_a_browser_gets_the_page_and_a_program_what_it_had(
    client: FlaskClient, accept: str | None, kind: str
) -> None:
    headers = {"Authorization": f"Bearer {KEY}", **({"Accept": accept} if accept else {})}
    answer = client.get("/", headers=headers)
    assert (answer.status_code, answer.mimetype) == (200, kind)
    if kind != "text/html":
        assert client.get("/", headers={"Accept": accept} if accept else {}).status_code == 401


def test_the_page_may_run_its_own_files_and_nothing_else(client: FlaskClient) -> None:
    for path in ("/", *files(client)):
        answer = client.get(path, headers={"Accept": BROWSER})
        policies = answer.headers.getlist("Content-Security-Policy")
        assert len(policies) == 1
        rules = dict(rule.strip().split(" ", 1) for rule in policies[0].split(";"))
        assert rules["default-src"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert rules["require-trusted-types-for"] == "'script'"
        assert "unsafe" not in policies[0]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "Set-Cookie" not in answer.headers


def test_what_is_not_the_page_may_still_run_nothing(client: FlaskClient) -> None:
    for path in ("/health", "/page/x/main.js", "/nothing"):
        policy = client.get(path, headers={"Accept": BROWSER}).headers["Content-Security-Policy"]
        assert policy == "default-src 'none'; frame-ancestors 'none'", path


def test_the_document_has_no_script_or_style_of_its_own() -> None:
    document = SOURCES["index.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", document)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", document))


def test_no_file_of_the_page_turns_text_into_html_or_code() -> None:
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc"
        r"|DOMParser|setHTML|createContextualFragment|setTimeout\([\"']"
    )
    for name, source in SOURCES.items():
        assert not forbidden.search(source), name


def test_the_page_names_no_other_server() -> None:
    for name, source in SOURCES.items():
        hosts = set(re.findall(r"https?://([\w.-]+\w)", source))
        assert hosts <= {"www.w3.org"}, name  # the name of SVG, which nobody fetches


def test_every_file_that_is_named_is_there(client: FlaskClient) -> None:
    served = files(client)
    assert {path.rpartition("/")[2] for path in served} == SOURCES.keys() - {"index.html"}
    assert all(client.get(path).status_code == 200 for path in served)
    for name, source in SOURCES.items():
        imported = re.findall(r'^import .*?"\./([^"]+)";$', source, re.MULTILINE)
        assert set(imported) <= SOURCES.keys(), name
    kinds = {path.rpartition(".")[2]: client.get(path).mimetype for path in served}
    assert kinds == {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


def test_a_browser_asks_for_each_file_once_and_learns_of_an_update_at_once(
    client: FlaskClient,
) -> None:
    first = client.get("/", headers={"Accept": BROWSER})
    assert first.headers["Cache-Control"] == "no-cache"
    assert "Accept" in first.headers["Vary"]
    again = {"Accept": BROWSER, "If-None-Match": first.headers["ETag"]}
    assert client.get("/", headers=again).status_code == 304
    path = files(client)[0]
    file = client.get(path)
    assert "immutable" in file.headers["Cache-Control"]
    assert client.get(path, headers={"If-None-Match": file.headers["ETag"]}).status_code == 304
    _, _, digest, name = path.split("/")
    assert client.get(f"/page/{'0' * len(digest)}/{name}").status_code == 404
    assert client.get(f"/page/{digest}/index.html").status_code == 404


def test_the_page_is_small() -> None:
    assert sum(map(len, SOURCES.values())) < LARGEST_BYTES


def test_the_package_contains_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files([str(ROOT / "setup.cfg")])
    distribution.packages = ["mlxproxy"]
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    packed = {Path(file).name for _, _, _, found in command.data_files for file in found}
    assert packed >= SOURCES.keys()


def test_each_client_of_the_documentation_is_on_the_page() -> None:
    document = (ROOT / "docs" / "clients.md").read_text()
    document = re.sub("<!-- clients -->.*<!-- /clients -->", "", document, flags=re.DOTALL)
    headings = set(re.findall(r"^## (.+)$", document, re.MULTILINE))
    rows = set(re.findall(r"^\| ([^|]+?) \| (?!How|Version|-)", document, re.MULTILINE))
    groups = {"Libraries", "Coding agents", "Clients of other APIs"}
    wanted = headings - groups - {"What was tried", "What does not work yet"} | rows
    wanted.discard("openai")  # for Responses; the page shows that package once
    shown = set(re.findall(r'\{ name: "([^"]+)"', SOURCES["clients.js"]))
    assert wanted - {"---"} <= shown


# -- the addresses


def test_a_server_for_this_machine_only_has_no_address_for_others() -> None:
    assert addresses.of("127.0.0.1", 8080) == addresses.of("::1", 8080) == []
    assert addresses.of("localhost", 8080) == []


def test_a_server_on_one_address_has_that_one() -> None:
    assert addresses.of("192.168.1.5", 8080) == ["http://192.168.1.5:8080"]
    assert addresses.of("fd00::5", 8080) == ["http://[fd00::5]:8080"]


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give this machine these addresses and this name."""

    def give(*found: str, name: str = "mac") -> None:
        family = addresses.socket.AF_INET
        cards = {str(it): [SimpleNamespace(family=family, address=it)] for it in found}
        monkeypatch.setattr(addresses.psutil, "net_if_addrs", lambda: cards)
        monkeypatch.setattr(addresses.socket, "gethostname", lambda: name)

    return give


def test_a_server_on_all_addresses_names_those_that_others_can_reach(
    network: Callable[..., None],
) -> None:
    network("127.0.0.1", "203.0.113.9", "169.254.3.4", "192.168.1.5", name="Mac.local")
    assert addresses.of("0.0.0.0", 8080) == [
        "http://192.168.1.5:8080",
        "http://203.0.113.9:8080",
        "http://mac.local:8080",
    ]
    network(*(f"10.0.0.{number}" for number in range(1, 100)))
    assert len(addresses.of("::", 8080)) == addresses.LONGEST_LIST


FINDER = ["1111111", "1000001", "1011101", "1011101", "1011101", "1000001", "1111111"]


def test_an_address_is_shown_as_a_qr_code() -> None:
    pytest.importorskip("segno")
    rows = addresses.qr_code("http://192.168.1.5:8080")
    assert all(len(row) == len(rows) for row in rows)
    assert [row[:7] for row in rows[:7]] == [row[-7:] for row in rows[:7]] == FINDER
    assert rows != addresses.qr_code("http://192.168.1.6:8080")


# -- answers under way


WHO = {"id": "1", "client": "10.0.0.1", "method": "POST", "path": "/v1/chat/completions"}


def test_answers_are_listed_with_how_far_they_are() -> None:
    answers, stats = Answers(), AnswerStats()
    name = answers.begin(UnderWay({**WHO, "status": 200}, stats, "tiny/alpha", lambda: None))
    (told,) = answers.describe()
    assert (told["name"], told["client"], told["model"]) == (name, "10.0.0.1", "tiny/alpha")
    assert told["phase"] == "waiting"
    stats.granted, stats.model = stats.started, "tiny/beta"
    (told,) = answers.describe()
    assert (told["phase"], told["model"]) == ("reading", "tiny/beta")
    stats.first_byte, stats.tokens_out = stats.started + 1, 5
    (told,) = answers.describe()
    assert (told["phase"], told["tokens_out"], told["first_token"]) == ("answering", 5, 1.0)
    answers.end(name)
    assert answers.describe() == []
    assert not answers.abort(name)


def test_an_answer_whose_end_nobody_recorded_is_not_listed_for_ever() -> None:
    answers, stats = Answers(), AnswerStats()
    name = answers.begin(UnderWay(WHO, stats, None, lambda: None))
    stats.end("client_gone")
    assert answers.describe() == []
    assert not answers.abort(name)


def test_only_the_answer_of_that_name_is_ended() -> None:
    answers, ended = Answers(), []
    first = answers.begin(UnderWay(WHO, AnswerStats(), None, lambda: ended.append("first")))
    second = answers.begin(UnderWay(WHO, AnswerStats(), None, lambda: ended.append("second")))
    assert first != second, "clients choose the ids of their requests; names must differ"
    assert answers.abort(second)
    assert ended == ["second"]
