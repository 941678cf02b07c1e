"""The user's settings for each model: load options, request defaults, and further names.

They are three settings in ``config.py``: `MODELS` (options for an id or a pattern), `PROFILES` (a
new name for a model with options) and `ALIASES` (other names, or patterns of names, for a model, a
profile, or whatever is loaded). They are checked when the proxy starts, so a wrong value is one
sentence then and not a failed request later.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from mlxproxy.backend.spec import Tuning
from mlxproxy.errors import InvalidRequest
from mlxproxy.guard.check import Kind, Rules, Terms
from mlxproxy.guard.shapes import Limits
from mlxproxy.settings import SettingError, Settings, byte_size, seconds

LOADED = "loaded"  # the target of an alias that means whatever is loaded
T = TypeVar("T")
NO_LIMITS = Limits(template_kwargs=frozenset({"enable_thinking"}))


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("True or False")
    return value


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return parse


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("text that is not empty")
    return value


def _ttl(value: Any) -> float:
    try:
        return seconds(value)
    except ValueError:
        raise ValueError("seconds, or a duration such as 90s, 30m, 2h; 0 means never") from None


def _kv_bits(value: Any) -> int:
    if value not in (2, 3, 4, 6, 8) or isinstance(value, bool):
        raise ValueError("2, 3, 4, 6 or 8")
    return int(value)


# The options of a load, besides a profile's and a request's own values.
LOAD_OPTIONS: Mapping[str, Callable[[Any], Any]] = {
    "enable_thinking": _boolean,
    "ttl": _ttl,
    "pin": _boolean,
    "context": _whole(128, 1 << 24),
    "draft_model": _text,
    "adapter": _text,
    "kv_bits": _kv_bits,
    "prompt_cache_bytes": byte_size,
    "decode_concurrency": _whole(1, 256),
}
# Defaults for the fields that a request does not set; they are checked like a request.
REQUEST_DEFAULTS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "reasoning_effort",
    "enable_thinking",
    "system",
)
_TUNING = {item.name for item in fields(Tuning)}
SERVER = ".server"  # the end of an engine's name, which may be left out
ENGINE = "engine"  # the option that names the engine that serves a model


@dataclass(frozen=True)
class Options:
    """The options that are set for a model or a profile.

    Attributes:
        load: for `ModelSpec`, by its fields' names.
        tuning: for `Tuning`, by its fields' names.
        request: defaults for the fields of a request; `system` is a system message.
    """

    load: Mapping[str, Any] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)

    def over(self, below: Options) -> Options:
        """Return both combined; if both set an option, this one takes precedence."""
        return Options(
            {**below.load, **self.load},
            {**below.tuning, **self.tuning},
            {**below.request, **self.request},
        )

    def tuned(self) -> Tuning:
        """Return the options that require a process of their own."""
        return Tuning(**self.tuning)


@dataclass(frozen=True)
class Profile:
    """A name for a model with options.

    Attributes:
        model: the model's id, path or short name, as set.
    """

    name: str
    model: str
    options: Options


class Preferences:
    """The user's options and names, checked.

    Args:
        rules: those for requests, to check the defaults of requests.
        engines: the names of the engines, to check those that MODELS names.

    Raises:
        SettingError: an unknown option, a value that is not allowed, or names in a circle.
    """

    def __init__(
        self, settings: Settings, rules: Mapping[Kind, Rules], engines: Collection[str] = ()
    ) -> None:
        for pattern, given in settings.models:
            _require_engine(pattern, given, engines)
        self._models = {
            pattern: _options(f"MODELS[{pattern!r}]", given, rules, thinking_of_load=True)
            for pattern, given in settings.models
        }
        self.profiles = {name: _profile(name, given, rules) for name, given in settings.profiles}
        for profile in self.profiles.values():
            if profile.model in self.profiles:
                raise SettingError(
                    f"PROFILES[{profile.name!r}]: its model, {profile.model!r}, is a profile. Name "
                    "a model."
                )
        self._aliases = dict(settings.aliases)
        for name in self._aliases:
            self._followed(name)

    def of(self, model_id: str) -> Options:
        """Return the options of a model: patterns in order, then its id; later ones win."""
        found = Options()
        for options in matching(self._models, model_id):
            found = options.over(found)
        return found

    def strangers(self, knows: Callable[[str], bool]) -> list[str]:
        """Return, each as a sentence, the settings that name a model which is not there.

        Args:
            knows: returns whether a model has that name.
        """
        named: list[tuple[str, Any]] = [
            *((f"PROFILES[{each.name!r}]", each.model) for each in self.profiles.values()),
            *((f"ALIASES[{name!r}]", self._followed(name)) for name in self._aliases),
            *(
                (f"MODELS[{pattern!r}]: draft_model", options.tuning.get("draft_model"))
                for pattern, options in self._models.items()
            ),
        ]
        own = {None, LOADED, *self.profiles}
        return [
            f"{where} names {model!r}, which is not on disk (yet)."
            for where, model in named
            if model not in own and not knows(model)
        ]

    def meaning(self, name: str) -> str | None:
        """Return the target of an alias (a model, a profile, `LOADED`); None for other names."""
        if name in self._aliases:
            return self._followed(name)
        lowered = name.lower()
        for pattern in self._aliases:
            if fnmatchcase(lowered, pattern.lower()):
                return self._followed(pattern)
        return None

    def _followed(self, alias: str) -> str:
        seen = [alias]
        while (target := self._aliases[seen[-1]]) in self._aliases:
            if target in seen:
                circle = " → ".join([*seen[seen.index(target) :], target])
                raise SettingError(
                    f"ALIASES go in a circle: {circle}. Let one of them name a model, a profile or "
                    f"{LOADED!r}."
                )
            seen.append(target)
        return target


def _require_engine(pattern: str, given: Mapping[str, Any], engines: Collection[str]) -> None:
    """Return if an entry of MODELS names an engine that there is, or none.

    Raises:
        SettingError: there is no such engine.
    """
    name, known = given.get(ENGINE), _short(engines)
    if ENGINE in given and not (isinstance(name, str) and name.removesuffix(SERVER) in known):
        raise SettingError(
            f"MODELS[{pattern!r}]: engine = {name!r} must be one of {', '.join(known)}."
        )


def _short(engines: Iterable[str]) -> dict[str, str]:
    """Return the names of engines by the ones that users write: ``mlx_lm`` is enough."""
    return {name.removesuffix(SERVER): name for name in engines}


def matching(models: Mapping[str, T], model_id: str) -> Iterator[T]:
    """Yield what is set for a model: by patterns in order, then by its id."""
    for pattern, value in models.items():
        if pattern != model_id and fnmatchcase(model_id.lower(), pattern.lower()):
            yield value
    if model_id in models:
        yield models[model_id]


class EngineChoice:
    """The engines that MODELS names for models.

    A name that no engine has chooses nothing: it is `Preferences` that rejects it.

    Args:
        engines: the names of those that there are.
    """

    def __init__(self, settings: Settings, engines: Iterable[str]) -> None:
        known = _short(engines)
        self._chosen: dict[str, str] = {}
        for pattern, given in settings.models:
            name = given.get(ENGINE)
            if isinstance(name, str) and (engine := known.get(name.removesuffix(SERVER))):
                self._chosen[pattern] = engine

    @property
    def fingerprint(self) -> str:
        """An identifier that changes with the choice."""
        return repr(self._chosen) if self._chosen else ""

    def __call__(self, model_id: str) -> str | None:
        """Return the name of the engine chosen for a model; None: none is."""
        return next(reversed([*matching(self._chosen, model_id)]), None)


def _profile(name: str, given: Mapping[str, Any], rules: Mapping[Kind, Rules]) -> Profile:
    where = f"PROFILES[{name!r}]"
    rest = dict(given)
    model = rest.pop("model", None)
    if not isinstance(model, str) or not model.strip():
        raise SettingError(f"{where}: model must be the name of a model.")
    return Profile(name, model, _options(where, rest, rules, thinking_of_load=False))


def _options(
    where: str, given: Mapping[str, Any], rules: Mapping[Kind, Rules], thinking_of_load: bool
) -> Options:
    """Return the options of one entry.

    Args:
        thinking_of_load: whether `enable_thinking` belongs to the load. In a profile it belongs to
            the requests, so that two profiles of one model share its process.
    """
    load: dict[str, Any] = {}
    tuning: dict[str, Any] = {}
    request: dict[str, Any] = {}
    for name, value in given.items():
        of_load = name in LOAD_OPTIONS and (name != "enable_thinking" or thinking_of_load)
        if of_load:
            try:
                parsed = LOAD_OPTIONS[name](value)
            except ValueError as allowed:
                raise SettingError(f"{where}: {name} = {value!r} must be {allowed}.") from None
            (tuning if name in _TUNING else load)[name] = parsed
        elif name == ENGINE and thinking_of_load:
            continue  # for the catalogue: see `EngineChoice`
        elif name in REQUEST_DEFAULTS:
            request[name] = value
        else:
            known = sorted({*LOAD_OPTIONS, *REQUEST_DEFAULTS, ENGINE})
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f" Did you mean {close[0]}?" if close else f" There are {', '.join(known)}."
            raise SettingError(f"{where}: {name} is not an option.{hint}")
    _require_allowed(where, request, rules)
    return Options(load, tuning, request)


def _require_allowed(where: str, request: Mapping[str, Any], rules: Mapping[Kind, Rules]) -> None:
    """Return if a request with these fields would be accepted.

    Raises:
        SettingError: it would not be accepted.
    """
    fields = dict(request)
    messages = [{"role": "user", "content": "Hi"}]
    if (system := fields.pop("system", None)) is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        Terms(rules, NO_LIMITS).check({"messages": messages, **fields}, "chat")
    except InvalidRequest as error:
        sentence = error.message.replace("messages[0].content", "system")
        raise SettingError(f"{where}: {sentence}") from None
