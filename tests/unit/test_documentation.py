"""The documents say all that the program can do, and nothing else."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import click
import pytest

from benchmarks import tables
from benchmarks.__main__ import DOCUMENT, PICTURE, RESULTS
from benchmarks.report import Report
from mlxproxy import __version__, dialects, errors, settings
from mlxproxy.blueprints.app import create_app
from mlxproxy.cli import main
from tools import reference

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TEXTS = {
    str(file.relative_to(ROOT)): file.read_text()
    for file in (*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")))
}
ENDPOINTS = TEXTS["docs/endpoints.md"]
NAMED = r"`(test_\w+)::(test_\w+)`"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The commands of a document's shell blocks: what is set before each, and its words."""
    for language, block in FENCED.findall(text):
        begun = ""
        for line in block.splitlines() if language == "sh" else ():
            begun += line + "\n"
            try:
                words = shlex.split(begun, comments=True)
            except ValueError:  # a quotation goes on in the next line
                continue
            begun = ""
            yield from _simple(words)
        assert not begun, f"a quotation without an end: {begun}"


def _simple(words: list[str]) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Each command of a pipe or a list."""
    variables: dict[str, str] = {}
    simple: list[str] = []
    for word in [*words, "|"]:
        name, equals, value = word.partition("=")
        if word in ("|", "&&"):
            if simple:
                yield variables, simple
            variables, simple = {}, []
        elif equals and not simple and re.fullmatch("[A-Z_]+", name):
            variables[name] = value
        else:
            simple.append(word)


def anchors(text: str) -> set[str]:
    """What links can lead to: the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# -- made from the program


@pytest.mark.parametrize("part", reference.PARTS)
def test_a_generated_part_is_what_the_program_says(part: str) -> None:
    document = TEXTS[f"docs/{part}.md"]
    assert reference.rewritten(document, part) == document, "run: make reference"


def test_every_command_and_option_has_a_help_text() -> None:
    with click.Context(main, info_name="mlxproxy") as context:
        for each in reference.contexts(context):
            assert each.command.help, f"{each.command_path} has no help"
            for option in reference.options(each):
                assert option.help, f"{each.command_path} {option.opts[0]} has no help"


def test_the_results_shown_are_those_of_the_last_run() -> None:
    report = Report.from_json(json.loads(RESULTS.read_text()))
    shown = DOCUMENT.read_text()
    assert tables.put(shown, report) == shown, "run: python -m benchmarks --stored"
    assert f"]({PICTURE.name})" in shown


# -- held to the program


def routes() -> set[str]:
    parts: Any = SimpleNamespace(settings=settings.Settings(instance_path=Path("/nowhere")))
    rules = (rule.rule for rule in create_app(parts).url_map.iter_rules())
    found = {re.sub("<.*>", "{id}", rule) for rule in rules}
    return {route for route in found if f"/v1{route}" not in found}  # the same without /v1


def test_the_endpoints_are_those_there_are() -> None:
    table = ENDPOINTS.partition("## Errors")[0]
    assert set(re.findall(r"`(?:GET|POST|DELETE) (/\S*)`", table)) == routes()


def served_dialects() -> list[ModuleType]:
    """The modules of the dialects, whose errors clients meet once a blueprint serves them."""
    sources = (ROOT / "mlxproxy" / "blueprints").glob("*.py")
    if not any("mlxproxy.dialects" in source.read_text() for source in sources):
        return []
    found = pkgutil.iter_modules(dialects.__path__, dialects.__name__ + ".")
    return [importlib.import_module(module.name) for module in found]


def test_the_errors_are_those_there_are() -> None:
    rows = re.findall(r"^\| (\d{3}) \| ([^|]+) \|", ENDPOINTS, re.MULTILINE)
    documented = {
        (int(status), code) for status, codes in rows for code in re.findall(r"\w+", codes)
    }
    modules = {"mlxproxy.errors", *(module.__name__ for module in served_dialects())}
    classes = [errors.ProxyError]
    for kind in classes:
        classes += kind.__subclasses__()
    there_are = {
        (kind.status, kind.code)
        for kind in classes
        if kind.__module__ in modules and not kind.__name__.startswith("_")
    }
    assert documented == there_are


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_shown_is_one_that_the_program_takes(name: str) -> None:
    for _, (program, *arguments) in commands(TEXTS[name]):
        if Path(program).name != "mlxproxy":
            continue
        context = click.Context(main, info_name="mlxproxy")
        command: click.Command = main
        while isinstance(command, click.Group):
            command = command.commands[arguments.pop(0)]
        command.make_context(command.name, arguments, parent=context)


@pytest.mark.parametrize("name", TEXTS)
def test_every_target_and_setting_shown_is_one_there_is(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {setting for setting, _, _ in settings.describe()}
    clients = {"MLXPROXY_URL", "MLXPROXY_API_KEY"}
    for variables, (program, *arguments) in commands(TEXTS[name]):
        for variable in variables.keys() - clients:
            assert variable.removeprefix("MLXPROXY_") in known
        if program == "make":
            given = {word.partition("=")[0] for word in arguments if "=" in word}
            assert given - {"PYTHON"} <= known
            assert {word for word in arguments if "=" not in word} <= targets
    for shown in re.findall(r"`make ([a-z ]+)", TEXTS[name]):
        assert set(shown.split()) <= targets


@pytest.mark.parametrize("name", TEXTS)
def test_every_address_shown_is_one_that_is_answered(name: str) -> None:
    for _, (program, *arguments) in commands(TEXTS[name]):
        for word in arguments if program == "curl" else ():
            if word.startswith("http"):
                assert urlsplit(word).path in routes()
            elif word.startswith("{"):
                json.loads(word)


def test_all_help_fits_80_columns_and_cuts_no_word() -> None:
    with click.Context(main, info_name="mlxproxy", max_content_width=80) as context:
        for each in reference.contexts(context):
            each.terminal_width = 80
            shown = each.command.get_help(each)
            assert max(map(len, shown.splitlines())) <= 80, shown
            helps = [each.command.help, *(option.help for option in reference.options(each))]
            words = {word for text in helps for word in (text or "").split()} - {"\b"}
            assert words <= set(shown.split()), words - set(shown.split())


def test_each_setting_says_what_kind_of_value_it_takes() -> None:
    flags = {
        flag.opts[0]: flag.metavar
        for flag in main.commands["serve"].get_params(click.Context(main.commands["serve"]))
        if isinstance(flag, click.Option)
    }
    kinds = {
        "--proxy-port": "PORT",
        "--max-queue": "INTEGER",
        "--enable-thinking": "true|false",
        "--model-selection": "requested|loaded",
        "--idle-ttl": "DURATION",
        "--max-body": "SIZE",
        "--api-key-file": "PATH",
        "--proxy-host": "ADDRESS",
    }
    assert kinds.items() <= flags.items()


def test_every_promise_in_security_md_names_tests_that_exist() -> None:
    rows = [line for line in TEXTS["SECURITY.md"].splitlines() if line.startswith("|")]
    promises = [row for row in rows if row not in ("| Promise | Test |", "|---|---|")]
    assert len(promises) > 20
    for row in promises:
        found = re.fullmatch(rf"\| (\S.*) \| ({NAMED}(?:, {NAMED})*) \|", row)
        assert found, f"not a promise and its tests: {row}"
        for file, name in re.findall(NAMED, found[2]):
            sources = [path.read_text() for path in (ROOT / "tests").rglob(f"{file}.py")]
            holders = [source for source in sources if f"\ndef {name}(" in source]
            assert len(holders) == 1, f"{file}::{name} is in {len(holders)} files"


# -- readable


@pytest.mark.parametrize("name", TEXTS)
def test_no_link_is_dead(name: str) -> None:
    here = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", TEXTS[name])):
        if re.match("https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (here.parent / path).resolve() if path else here
        assert file.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{name} links to {target}"


def test_every_page_is_found_from_the_readme() -> None:
    linked = {target.partition("#")[0] for target in re.findall(r"\]\((\S+)\)", TEXTS["README.md"])}
    assert linked >= TEXTS.keys() - {"README.md"}


def test_the_changelog_has_a_place_for_changes_or_this_version() -> None:
    first = re.search(r"^## \[(.+?)\](?: - \d{4}-\d\d-\d\d)?$", TEXTS["CHANGELOG.md"], re.MULTILINE)
    assert first
    assert first[1] in ("Unreleased", __version__)
