"""Shapes of a request's fields: what a value must look like, and what the backend gets for it.

A shape is called with the field's name, its value from the JSON (never null) and the limits. It
returns the value for the backend, or :data:`DROP` for a field that the backend must not see, and
raises :class:`~mlxproxy.errors.InvalidRequest`, which names the field. The reasons for each bound
are in an engine's table of rules.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mlxproxy.errors import InvalidRequest

MAX_MESSAGES = 2048  # OpenAI's own limit
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024  # all stop texts together
MAX_NAME = 256  # characters of a name or of another short text
TOKEN_ID = re.compile(r"[0-9]{1,9}")

ROLES: Final = {
    "system": "system",
    "developer": "system",  # OpenAI's current name; templates know only the old one
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "function",
}
SPEAKERS: Final = frozenset({"system", "developer", "user"})  # roles that must say something
EFFORTS: Final = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "max"})
FORMATS: Final = ("text", "json_object", "json_schema")
TOOL_CHOICES: Final = frozenset({"none", "auto", "required"})
TEXT_KEYS: Final = {"text": "text", "refusal": "refusal"}  # content part's type -> its text
IMAGE_TYPES: Final = frozenset({"image_url", "input_image", "image"})
DATA_URL = re.compile(r"data:[^,]{0,100};base64,", re.IGNORECASE)
IMAGE_FORMATS = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8|RIFF....WEBP", re.DOTALL)

DROP: Final = object()


@dataclass(frozen=True)
class Limits:
    """The limits that the loaded model and the settings impose.

    None means "not known yet": what depends on it is left unchecked, and the request must be
    checked again with the actual limit before the backend gets it.
    """

    template_kwargs: frozenset[str]
    """Names that `chat_template_kwargs` may set."""
    adapters: frozenset[str] = frozenset()
    draft_models: frozenset[str] = frozenset()
    max_tokens: int = 131_072
    """Tokens that one answer may have at most, whatever the model."""
    max_image_bytes: int = 20 << 20
    """Bytes of one image, decoded from its data URL."""
    max_pixels: int = 64_000_000
    """Pixels of all images of a request together: the backend unpacks each to three bytes a pixel,
    whatever its file's size."""
    vocab_size: int | None = None
    """Ids below it are the model's, with or without a text. 0 if a loaded model's is not to be
    found out."""
    max_context: int | None = None
    """Tokens of prompt and answer together."""
    images: bool | None = None
    """Whether the model reads images."""


Shape = Callable[[str, Any, Limits], Any]


def refusal(name: str, expected: str) -> InvalidRequest:
    """Return the error for the field of that name, with what it must be instead."""
    return InvalidRequest(f"{name} must be {expected}.", param=name)


# -- plain values


def boolean(name: str, value: Any, limits: Limits) -> bool:
    """Return the value, which must be true or false."""
    if not isinstance(value, bool):
        raise refusal(name, "true or false")
    return value


def string(name: str, value: Any, limits: Limits) -> str:
    """Return the value, which must be a string."""
    if not isinstance(value, str):
        raise refusal(name, "a string")
    return value


def drop(name: str, value: Any, limits: Limits) -> Any:
    """Drop the field: the backend does not read it here."""
    return DROP


def number(low: float, high: float, digits: int) -> Shape:
    """Return a shape: a finite number within the bounds, as a float with `digits` decimals."""

    def shape(name: str, value: Any, limits: Limits) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise refusal(name, f"a number from {low:g} to {high:g}")
        return round(float(value), digits)

    return shape


def integer(low: int, high: int) -> Shape:
    """Return a shape: a whole number within the bounds. 5.0 counts as one, true does not."""

    def shape(name: str, value: Any, limits: Limits) -> int:
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise refusal(name, f"a whole number from {low} to {high}")
        return value

    return shape


def only(allowed: int | bool | str, advice: str) -> Shape:
    """Return a shape: a single value, for a field of OpenAI's API that the backend ignores."""

    def shape(name: str, value: Any, limits: Limits) -> Any:
        if type(value) is not type(allowed) or value != allowed:
            raise InvalidRequest(f"{name}: {advice}", param=name)
        return value

    return shape


def absent(advice: str) -> Shape:
    """Return a shape that rejects a field that would change the answer, but is ignored."""

    def shape(name: str, value: Any, limits: Limits) -> Any:
        raise InvalidRequest(f"{name}: {advice}", param=name)

    return shape


def one_of(names: frozenset[str]) -> Shape:
    """Return a shape: one of these words."""

    def shape(name: str, value: Any, limits: Limits) -> str:
        if not isinstance(value, str) or value not in names:
            raise refusal(name, f"one of {', '.join(sorted(names))}")
        return value

    return shape


def allowed(choice: Callable[[Limits], frozenset[str]]) -> Shape:
    """Return a shape: a name that the load allows."""

    def shape(name: str, value: Any, limits: Limits) -> str:
        if not isinstance(value, str) or value not in choice(limits):
            raise InvalidRequest(f"{name} cannot be set by a request; leave it out.", param=name)
        return value

    return shape


# -- sampling and length


def top_p(name: str, value: Any, limits: Limits) -> float:
    """Return a share above 0: the backend takes 0 for "off", others for "the likeliest only"."""
    share: float = number(0, 1, 3)(name, value, limits)
    return max(share, 0.001)


def top_k(name: str, value: Any, limits: Limits) -> int:
    """Return the count, or 0 (off) if it cuts nothing off: -1, or not below the vocabulary size."""
    count: int = integer(-1, (1 << 63) - 1)(name, value, limits)
    if count == -1 or (limits.vocab_size is not None and count >= limits.vocab_size):
        return 0
    return count


def seed(name: str, value: Any, limits: Limits) -> Any:
    """Return 64 bits; -1 means "any" (as in llama.cpp), other negative numbers keep their bits."""
    value = integer(-(1 << 63), (1 << 64) - 1)(name, value, limits)
    return DROP if value == -1 else value % (1 << 64)


def max_tokens(name: str, value: Any, limits: Limits) -> int:
    """Return at least 1 and at most what is possible, which -1 asks for (as in LM Studio)."""
    if value != -1:
        value = integer(1, (1 << 63) - 1)(name, value, limits)
    most = min(limits.max_tokens, limits.max_context or limits.max_tokens)
    return most if value == -1 else min(value, most)


def logit_bias(name: str, value: Any, limits: Limits) -> dict[str, float]:
    """Return an object that maps token ids of the vocabulary to numbers from -100 to 100."""
    if not isinstance(value, dict):
        raise refusal(name, "an object from token ids to numbers")
    if limits.vocab_size == 0 and value:
        raise InvalidRequest(f"{name}: the token ids of the loaded model are unknown.", param=name)
    bias = number(-100, 100, 3)
    checked = {}
    for token, amount in value.items():
        if not TOKEN_ID.fullmatch(token) or (
            limits.vocab_size is not None and int(token) >= limits.vocab_size
        ):
            known = "" if limits.vocab_size is None else f" below {limits.vocab_size}"
            raise InvalidRequest(f"{name}: its keys must be token ids{known}.", param=name)
        checked[token] = bias(f"{name}.{token}", amount, limits)
    return checked


def top_logprobs(most: int) -> Shape:
    """Return a shape: up to 20 alternatives, as OpenAI's API allows, cut to `most`, the backend's
    maximum."""

    def shape(name: str, value: Any, limits: Limits) -> int:
        count: int = integer(0, 20)(name, value, limits)
        return min(count, most)

    return shape


def text_logprobs(most: int) -> Shape:
    """Return a shape for text completions: a number of alternatives, or the backend's own true and
    false."""
    alternatives = top_logprobs(most)

    def shape(name: str, value: Any, limits: Limits) -> Any:
        return value if isinstance(value, bool) else alternatives(name, value, limits)

    return shape


def stop(name: str, value: Any, limits: Limits) -> Any:
    """Return the stop texts, given as one or as a list, without empty ones, which never match."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise refusal(name, "a string or a list of strings")
    texts = [text for text in texts if text]
    if len(texts) > MAX_STOPS or sum(map(len, texts)) > MAX_STOP_CHARACTERS:
        raise refusal(
            name, f"at most {MAX_STOPS} strings of {MAX_STOP_CHARACTERS} characters in total"
        )
    return texts or DROP


def stream_options(name: str, value: Any, limits: Limits) -> Any:
    """Return only `include_usage`, and only if it is true."""
    if not isinstance(value, dict):
        raise refusal(name, "an object")
    wanted = value.get("include_usage")
    if wanted is not None and not isinstance(wanted, bool):
        raise refusal(f"{name}.include_usage", "true or false")
    return {"include_usage": True} if wanted else DROP


def response_format(name: str, value: Any, limits: Limits) -> Any:
    """Return JSON or a JSON schema, in OpenAI's form; plain text is the default."""
    if not isinstance(value, dict) or value.get("type") not in FORMATS:
        raise refusal(name, f"an object whose type is one of {', '.join(FORMATS)}")
    if value["type"] == "text":
        return DROP
    form = value.get("json_schema")
    if value["type"] == "json_object":
        if value.get("schema") is None:
            return {"type": "json_object"}
        form = value  # as llama.cpp and others spell it
    if not isinstance(form, dict) or not isinstance(form.get("schema"), dict):
        raise refusal(name, "a JSON schema (an object), as json_schema.schema")
    strict = form.get("strict")
    if strict is not None:
        boolean(f"{name}.strict", strict, limits)
    checked = {"schema": form["schema"]} | ({} if strict is None else {"strict": strict})
    return {"type": "json_schema", "json_schema": checked}


def only_text(name: str, value: Any, limits: Limits) -> Any:
    """Accept only `["text"]`, which is the default."""
    if value != ["text"]:
        raise InvalidRequest(f"{name}: the model can only write text.", param=name)
    return DROP


# -- the prompt


def prompt(name: str, value: Any, limits: Limits) -> str:
    """Return one non-empty text; a list of one is accepted."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise InvalidRequest(
            f"{name} must be a single string: send several prompts one by one, and text instead "
            "of token ids.",
            param=name,
        )
    if not isinstance(value, str) or not value:
        raise refusal(name, "a non-empty string")
    return value


def messages(name: str, value: Any, limits: Limits) -> list[dict[str, Any]]:
    """Return a conversation, in the shape that chat templates read."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        raise refusal(name, f"a list of 1 to {MAX_MESSAGES} messages")
    checked = [_message(f"{name}[{index}]", item, limits) for index, item in enumerate(value)]
    if sum(_pixels(name, url) for url in images(checked)) > limits.max_pixels:
        raise refusal(name, f"limited to images of at most {limits.max_pixels:,} pixels in total")
    return checked


def images(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the data URLs of checked messages: only a content that is still a list has images."""
    return [
        part["image_url"]["url"]
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]


def _message(name: str, value: Any, limits: Limits) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refusal(name, "an object with a role and a content")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise refusal(f"{name}.role", f"one of {', '.join(ROLES)}")
    checked = {key: item for key, item in value.items() if item is not None}
    checked["role"] = ROLES[role]
    content = checked.get("content")
    if isinstance(content, list):
        checked["content"] = _parts(f"{name}.content", content, limits)
    elif content is None and role not in SPEAKERS:
        checked["content"] = ""
    elif not isinstance(content, str):
        raise refusal(f"{name}.content", "a string or a list of content parts")
    if "tool_calls" in checked:
        calls = _tool_calls(f"{name}.tool_calls", checked.pop("tool_calls"))
        if calls:  # templates treat even an empty list as a call
            checked["tool_calls"] = calls
    return checked


def _parts(name: str, parts: list[Any], limits: Limits) -> str | list[dict[str, Any]]:
    """Return the text of the parts or, if there are images among them, the normalized parts."""
    checked = [_part(f"{name}[{index}]", part, limits) for index, part in enumerate(parts)]
    if all(part["type"] == "text" for part in checked):
        return "".join(part["text"] for part in checked)
    return checked


def _part(name: str, part: Any, limits: Limits) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise refusal(name, "an object with a type")
    if kind in TEXT_KEYS:
        return {"type": "text", "text": string(f"{name}.{kind}", part.get(TEXT_KEYS[kind]), limits)}
    if kind in IMAGE_TYPES:
        return {"type": "image_url", "image_url": {"url": _image(name, part, limits)}}
    raise refusal(f"{name}.type", "text or image_url; the backend supports nothing else")


def _image(name: str, part: dict[str, Any], limits: Limits) -> str:
    """Return the data URL of an image, from any place where the backend would look for it."""
    name = f"{name}.{'image_url' if 'image_url' in part else 'image'}"
    url = part.get("image_url", part.get("image"))
    if isinstance(url, dict):
        name, url = f"{name}.url", url.get("url")
    start = DATA_URL.match(url) if isinstance(url, str) else None
    if not isinstance(url, str) or not start:
        raise refusal(name, "a data URL (data:image/png;base64,…); images are not fetched")
    if limits.images is False:
        raise InvalidRequest("The loaded model cannot read images.", param=name)
    if (len(url) - start.end()) * 3 // 4 > limits.max_image_bytes + 2:  # 2: the padding
        raise refusal(name, f"an image of at most {limits.max_image_bytes} bytes")
    try:
        image = base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise refusal(name, "valid base64 after the comma") from None
    if len(image) > limits.max_image_bytes:
        raise refusal(name, f"an image of at most {limits.max_image_bytes} bytes")
    if not IMAGE_FORMATS.match(image):
        raise refusal(name, "a PNG, JPEG, GIF or WebP image")
    return url


def _pixels(name: str, url: str) -> int:
    """Return an image's number of pixels, according to the library that the backend also uses."""
    from PIL import Image  # needed only for requests with images

    file = io.BytesIO(base64.b64decode(url.partition(",")[2]))
    try:
        with Image.open(file, formats=("PNG", "JPEG", "GIF", "WEBP")) as image:
            width, height = image.size
            return int(width * height)
    except Image.DecompressionBombError:  # more than twice what that library considers sane
        return 1 << 62
    except Exception:  # a broken file may raise anything
        raise refusal(name, "free of damaged images") from None


def _tool_calls(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise refusal(name, "a list of tool calls")
    return [_tool_call(f"{name}[{index}]", call) for index, call in enumerate(value)]


def _tool_call(name: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise refusal(f"{name}.function", "an object with a name and arguments")
    if not isinstance(function.get("name"), str):
        raise refusal(f"{name}.function.name", "a string")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = ()
    if arguments is not None and not isinstance(arguments, dict):
        raise refusal(f"{name}.function.arguments", "a JSON object as a string")
    # Already parsed, as the backend would do, so that all checks see its content.
    return {**call, "function": {**function, "arguments": arguments or {}}}


# -- texts to embed or to rank


def texts(most: int) -> Shape:
    """Return a shape: a text or a list of up to `most`; a list results. No text may be an image."""

    def shape(name: str, value: Any, limits: Limits) -> list[str]:
        given = value if isinstance(value, list) else [value]
        if not 0 < len(given) <= most:
            raise refusal(name, f"1 to {most} texts")
        found: list[str] = []
        for one in given:
            text = one.get("text") if isinstance(one, dict) else one
            place = f"{name}[{len(found)}]" if isinstance(value, list) else name
            if not isinstance(text, str):
                raise refusal(place, "a text; token ids and images cannot be read here")
            if text.lstrip().lower().startswith("data:image/"):
                raise refusal(place, "a text; images cannot be read here")
            found.append(text)
        return found

    return shape


# -- tools and templates


def tools(name: str, value: Any, limits: Limits) -> Any:
    """Return functions in OpenAI's shape, with parameters that the backend's parsers can read."""
    if not isinstance(value, list):
        raise refusal(name, "a list of tools")
    for index, tool in enumerate(value):
        place = f"{name}[{index}].function"
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise refusal(place, "an object with a name and parameters")
        if not isinstance(function.get("name"), str):
            raise refusal(f"{place}.name", "a string")
        if function.get("strict") is not None:
            boolean(f"{place}.strict", function["strict"], limits)
        parameters = function.get("parameters")
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise refusal(f"{place}.parameters", "a JSON schema (an object)")
        properties = parameters.get("properties")
        if properties is not None and not (
            isinstance(properties, dict) and all(isinstance(it, dict) for it in properties.values())
        ):
            raise refusal(f"{place}.parameters.properties", "an object of JSON schemas (objects)")
    return value or DROP


def tool_choice(name: str, value: Any, limits: Limits) -> Any:
    """Return a word, one function, or some of the tools (`allowed_tools`)."""
    if not isinstance(value, dict):
        return one_of(TOOL_CHOICES)(name, value, limits)
    if value.get("type") == "allowed_tools":
        name, allowed = f"{name}.allowed_tools", value.get("allowed_tools")
        if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list):
            raise refusal(name, "an object with a mode and tools")
        one_of(frozenset({"auto", "required"}))(f"{name}.mode", allowed.get("mode"), limits)
        functions = [_function(f"{name}.tools", tool) for tool in allowed["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {**allowed, "tools": functions}}
    return _function(name, value)


def _function(name: str, value: Any) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise refusal(
            name, 'none, auto, required, or {"type": "function", "function": {"name": ...}}'
        )
    return {"type": "function", "function": {"name": function["name"]}}


def chosen(choice: Mapping[str, Any]) -> set[str]:
    """Return the names of the tools that a checked `tool_choice` object allows."""
    tools = choice["allowed_tools"]["tools"] if "allowed_tools" in choice else [choice]
    return {tool["function"]["name"] for tool in tools}


def chat_template_kwargs(name: str, value: Any, limits: Limits) -> Any:
    """Return plain values for names that the settings allow; null means the load's own value."""
    if not isinstance(value, dict):
        raise refusal(name, "an object")
    checked = {key: item for key, item in value.items() if item is not None}
    for key, item in checked.items():
        if key not in limits.template_kwargs:
            names = ", ".join(sorted(limits.template_kwargs))
            raise InvalidRequest(f"{name} may only set {names}.", param=name)
        if key.endswith("thinking") and not isinstance(item, bool):
            raise refusal(f"{name}.{key}", "true or false")  # "false" would be true to a template
        if not isinstance(item, (bool, int, float, str)):
            raise refusal(f"{name}.{key}", "a plain value")
        if isinstance(item, str) and len(item) > MAX_NAME:
            raise refusal(f"{name}.{key}", f"at most {MAX_NAME} characters long")
    return checked or DROP


def role_mapping(name: str, value: Any, limits: Limits) -> dict[str, str]:
    """Return short texts by role, for models without a chat template."""
    if not isinstance(value, dict) or not all(
        isinstance(text, str) and len(text) <= MAX_NAME for text in value.values()
    ):
        raise refusal(name, f"an object from roles to strings of at most {MAX_NAME} characters")
    return value
