"""Conversations that clients send to chat, made such that chat templates take them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxproxy.dialects import conversation
from mlxproxy.engines.mlx_lm.rules import RULES
from mlxproxy.guard import check
from mlxproxy.guard.shapes import Limits
from tests.support import chat_wire as wire

USER = {"role": "user", "content": "Hello"}
SAID = {"role": "assistant", "content": "Hi"}
TOOL = {"role": "tool", "tool_call_id": "1", "content": "a.txt"}
LATE = {"role": "system", "content": "Late."}
REMINDER = "<system-reminder>\nLate.\n</system-reminder>"


def checked(*messages: Any) -> list[dict[str, Any]]:
    """What the backend gets of the messages of a chat request."""
    body = {"messages": conversation.repaired(list(messages))}
    request = check.check(body, RULES["chat"], Limits(template_kwargs=frozenset()))
    return conversation.settled(request["messages"])


def called(arguments: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "ls", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def test_several_system_messages_at_the_beginning_are_one() -> None:
    first = {"role": "system", "content": "One."}
    second = {"role": "developer", "content": [{"type": "text", "text": "Two."}]}
    assert checked(first, second, USER) == [{"role": "system", "content": "One.\n\nTwo."}, USER]


def test_a_developer_message_late_in_the_list_does_not_fail_a_template() -> None:
    assert checked(USER, {"role": "developer", "content": "Late."}) == [
        {"role": "user", "content": f"Hello\n\n{REMINDER}"}
    ]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER, SAID, LATE, USER], [USER, SAID, {**USER, "content": f"{REMINDER}\n\nHello"}]),
        ([USER, LATE, USER], [{**USER, "content": f"Hello\n\n{REMINDER}\n\nHello"}]),
        ([USER, TOOL, LATE], [USER, TOOL, {**USER, "content": REMINDER}]),
        ([USER, TOOL, LATE, SAID], [USER, TOOL, {**USER, "content": REMINDER}, SAID]),
        ([USER, {**LATE, "content": " "}, SAID], [USER, SAID]),
        ([USER, USER], [USER, USER]),  # the client's own
    ],
)
def test_a_late_system_message_joins_the_users_turn_beside_it(messages: Any, expected: Any) -> None:
    assert checked(*messages) == expected


def test_a_reminder_joins_a_turn_with_an_image() -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{wire.PNG}"}}
    (turn,) = checked({"role": "user", "content": [image]}, LATE)
    assert turn["content"] == [image, {"type": "text", "text": REMINDER}]


ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool"])


@given(st.lists(ROLES, max_size=12))
def test_no_order_of_roles_leaves_a_system_message_where_templates_raise(roles: list[str]) -> None:
    messages = [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]
    made = conversation.settled(messages)
    assert all(message["role"] != "developer" for message in made)
    assert all(message["role"] != "system" for message in made[1:])
    said = "\n".join(message["content"] for message in made)
    places = [said.index(message["content"]) for message in messages]
    assert places == sorted(places)  # all of it is there, in its order
    assert conversation.settled(made) == made


@given(st.lists(ROLES, max_size=8), ROLES)
def test_a_new_message_changes_nothing_before_the_last_turn(roles: list[str], role: str) -> None:
    messages = [{"role": name, "content": f"{name} {n}"} for n, name in enumerate(roles)]
    before = conversation.settled([USER, *messages])
    after = conversation.settled([USER, *messages, {"role": role, "content": "new"}])
    assert after[: len(before) - 1] == before[:-1]
    last = before[-1]["content"]
    assert after[len(before) - 1]["content"].startswith(last)


@pytest.mark.parametrize("broken", ['{"path": "a', "", "null", "[1]", '"text"', 5, ["a"], None])
def test_broken_arguments_of_an_old_call_do_not_end_the_session(broken: Any) -> None:
    made = checked(USER, called(broken), TOOL)
    assert made[1]["tool_calls"][0]["function"]["arguments"] == {}
    assert made[1]["content"] == ""


@pytest.mark.parametrize("whole", ['{"path": "a"}', {"path": "a"}])
def test_whole_arguments_stay(whole: Any) -> None:
    made = checked(USER, called(whole))
    assert made[1]["tool_calls"][0]["function"]["arguments"] == {"path": "a"}


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
def test_old_thoughts_are_where_templates_read_them(key: str) -> None:
    assert checked(USER, {**SAID, key: "Hm."}) == [USER, {**SAID, "reasoning_content": "Hm."}]


def test_thoughts_sent_twice_or_empty_are_not_doubled() -> None:
    both = {**SAID, "reasoning": "Hm.", "reasoning_content": "Hm."}
    assert checked(USER, both)[1]["reasoning_content"] == "Hm."
    assert checked(USER, {**SAID, "reasoning": "", "thinking": None}) == [USER, SAID]


@pytest.mark.parametrize("odd", [5, None, "Hello", [5], [{"role": "assistant", "tool_calls": 5}]])
def test_what_is_no_conversation_is_left_to_the_guard(odd: Any) -> None:
    assert conversation.repaired(odd) == odd
