"""What is known of a kind of backend lies in its folder, and nowhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlxproxy
from mlxproxy.backend.process import explain
from mlxproxy.engines.mlx_lm.engine import MlxLm

PACKAGE = Path(mlxproxy.__path__[0])
OWN = PACKAGE / "engines"
# Options, variables, log lines, paths, fields and comments of mlx_lm.server, and names of its code.
MLX_LM_LORE = [
    "--chat-template-args",
    "--max-tokens",
    "HF_HUB_OFFLINE",
    "MLXPROXY_INSIDE",
    "generation thread",
    "Exception in thread",
    "_generate",
    "Prompt processing progress",
    "keepalive ",
    "the prompt has no tokens",
    "system_fingerprint",
    "MODEL_REMAPPING",
    "ForSequenceClassification",
    "kv_lora_rank",
    "site-packages",
]
NAMED = re.compile("|".join(map(re.escape, MLX_LM_LORE)))


def literals(source: str) -> Iterator[str]:
    """The texts of a module, but for its comments and docstrings."""
    tree = ast.parse(source)
    told = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in told:
            if isinstance(node.value, bytes):
                yield node.value.decode("latin-1")
            elif isinstance(node.value, str):
                yield node.value


def lore_in(source: str) -> list[str]:
    return [found[0] for text in literals(source) for found in NAMED.finditer(text)]


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if OWN not in file.parents]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_its_engine_knows_what_mlx_lm_server_says_and_takes(file: Path) -> None:
    assert lore_in(file.read_text()) == []


def test_each_of_the_words_that_are_looked_for_is_one_that_the_engine_uses() -> None:
    used = {lore for file in OWN.rglob("*.py") for lore in lore_in(file.read_text())}
    assert used == set(MLX_LM_LORE)


@pytest.mark.parametrize(
    "source",
    ['X = "--max-tokens"', 'if b"generation thread died" in line: pass', 'X = f"{y}keepalive "'],
)
def test_a_word_that_is_elsewhere_is_found(source: str) -> None:
    assert lore_in(source)
    assert not lore_in(f'"""Not where something is explained: {source!a}."""  # {source}')


# -- advice on failed loads


@pytest.mark.parametrize(
    ("reason", "lines", "advice"),
    [
        (
            "Model type qwen9 not supported.",
            [],
            "the installed mlx-lm does not support the architecture qwen9. Update",
        ),
        ("it exited with status 1", ["…", "Missing 12 parameters:"], "weights are missing."),
        ("it was killed by SIGKILL", [], "the system killed it, most likely because memory"),
        ("its first chat failed: 404", [], "it loads, but cannot chat"),
        ("something new", [], "mlx_lm.server could not load it: something new"),
    ],
)
def test_a_failed_load_is_explained_by_its_reason_or_else_by_the_log(
    reason: str, lines: list[str], advice: str
) -> None:
    told = explain(MlxLm(None, 1, cache_bytes=lambda needed: needed), reason, lines)
    assert told.startswith(advice)
    assert "mlx_lm.server" in told
    assert reason in told
