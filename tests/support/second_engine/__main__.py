"""`python -m mlxproxy serve` with one engine more."""

from mlxproxy import main, settings
from mlxproxy.wiring import engines_of
from tests.support.second_engine.engine import Second

if __name__ == "__main__":
    chosen = settings.load()
    main.serve(chosen, [*engines_of(chosen), Second()])
