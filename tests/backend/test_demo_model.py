"""The demo model itself, downloaded and converted."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxproxy.demo import provide
from tests.support.server_process import SERVER_BIN, serve

pytestmark = pytest.mark.demo
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Kept where `make run` keeps it, so that it is downloaded once for both."""
    return provide.ensure(ROOT / "instance" / "models")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Call 555-019.", ["Call", "Ġ", "5", "5", "5", "-", "0", "1", "9", "."]),
        ("  two  spaces\n\n\ttab", ["Ġ", "Ġtwo", "Ġ", "Ġspaces", "ĊĊ", "ĉ", "tab"]),
        ("naïve café 🙂", ["na", "Ã¯ve", "ĠcafÃ©", "ĠðŁĻĤ"]),
        ("½ Ⅷ", ["Â½", "Ġ", "â", "ħ", "§"]),
        ("<|im_start|>user\nHi<|im_end|>", ["<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>"]),
        ("don't I'LL", ["don", "'t", "ĠI", "'", "LL"]),
    ],
)
def test_the_demo_models_tokenizer_splits_text_as_llama_cpp_does(
    smollm2: Path, text: str, pieces: list[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize(text) == pieces
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_demo_model_knows_the_capital_of_france(smollm2: Path, tmp_path: Path) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with serve(SERVER_BIN, smollm2, tmp_path / "log") as server:
        (choice,) = server.chat(messages=question, temperature=0, max_tokens=12)["choices"]
    assert "Paris" in choice["message"]["content"]
