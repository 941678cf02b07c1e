"""The other dialects over the real backend, read as their strictest clients do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Proxy
from tests.standin.test_dialects import DIALECTS, Dialect, post
from tests.support import tiny_models

pytestmark = pytest.mark.backend


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    root = tmp_path_factory.mktemp("models") / "tiny"
    tiny_models.build(root / "alpha", says="alpha", length=6)
    tiny_models.build(root / "beta", says="beta", length=6)
    proxy = Proxy(
        tmp_path_factory.mktemp("dialects") / "instance", root.parent, MODEL_SELECTION="requested"
    )
    yield proxy.start()
    proxy.clean_up()


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return DIALECTS[request.param]


def test_a_whole_answer_and_a_stream_say_the_same(proxy: Proxy, dialect: Dialect) -> None:
    whole = post(proxy, dialect)
    assert whole.status_code == 200, whole.text
    streamed = post(proxy, dialect, stream=True)
    assert "alpha" in dialect.said(whole.json())
    assert "alpha" in dialect.said(dialect.read(streamed.content))


def test_another_model_is_loaded_in_between(proxy: Proxy, dialect: Dialect) -> None:
    for name in ("beta", "alpha"):
        data = post(proxy, dialect, stream=True, model=f"tiny/{name}").content
        assert name in dialect.said(dialect.read(data))
