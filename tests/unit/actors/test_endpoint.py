"""The endpoint of programs, asked by OpenAI's own client: what it answers, what it refuses, and what becomes of the conversation."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
import openai
import psutil
import pytest

from actors.config import SamplingConfig
from actors.environment.base import Turn
from actors.environment.conversation import BranchError, Conversation
from actors.environment.endpoint import Endpoint

USER = {"role": "user", "content": "1+1="}
SAID = {"role": "assistant", "content": " two"}
MORE = {"role": "user", "content": "sure?"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
TURN = Turn(texts=[" t", "wo"], logprobs=[-0.5, -0.25], tokens=3, context_tokens=7, version=4)


def talk(
    play: Callable[[openai.AsyncOpenAI, Conversation], Coroutine[Any, Any, Any]],
    tool_parser: str | None = "hermes",
    **sampling: Any,
) -> Any:
    async def main() -> Any:
        endpoint = Endpoint(SamplingConfig(**sampling), tool_parser)
        url, (key, conversation) = await endpoint.url(), endpoint.open("0-1-2")
        async with openai.AsyncOpenAI(base_url=url, api_key=key) as client:
            return await asyncio.wait_for(play(client, conversation), 60)

    return asyncio.run(main())


async def answered(
    client: openai.AsyncOpenAI, conversation: Conversation, messages: list, answer: dict = SAID, **more: Any
) -> tuple[Any, list, list]:
    """(what the client gets, the request's new messages, its tools)."""
    asked = asyncio.ensure_future(client.chat.completions.create(model="any", messages=messages, **more))
    read = asyncio.ensure_future(conversation.asked())
    await asyncio.wait({asked, read}, return_when=asyncio.FIRST_COMPLETED)
    if asked.done():  # refused
        await asked
    new, tools = await read
    conversation.answer(answer, TURN)
    return await asked, new, tools


def test_a_client_gets_the_students_turns_and_only_new_messages_are_taken() -> None:
    async def play(client: Any, conversation: Conversation) -> None:
        first, new, tools = await answered(client, conversation, [{"role": "developer", "content": "Add."}, USER])
        assert new == [{"role": "system", "content": "Add."}, USER] and tools == []
        [choice] = first.choices
        assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", " two", "stop")
        assert choice.logprobs is None and first.model == "student" and first.system_fingerprint == "version-4"
        assert (first.usage.prompt_tokens, first.usage.completion_tokens, first.usage.total_tokens) == (7, 3, 10)
        # Some clients strip a turn's text, and write a user's as parts.
        talk = [{"role": "system", "content": "Add."}, {**USER, "content": [{"type": "text", "text": "1+1="}]}]
        second, new, _ = await answered(
            client, conversation, [*talk, {"role": "assistant", "content": "two"}, MORE], logprobs=True
        )
        assert new == [MORE]
        content = second.choices[0].logprobs.content
        assert [(one.token, one.logprob, bytes(one.bytes)) for one in content] == [
            (" t", -0.5, b" t"), ("wo", -0.25, b"wo"),
        ]  # fmt: skip
        assert second.id != first.id
        silent, new, _ = await answered(
            client, conversation, [*talk, SAID, MORE, second.choices[0].message, MORE, MORE], {**SAID, "content": ""}
        )
        assert new == [MORE, MORE] and silent.choices[0].message.content == ""
        nothing = {"role": "assistant", "content": ""}
        _, new, _ = await answered(
            client, conversation, [*talk, SAID, MORE, SAID, MORE, MORE, {**nothing, "content": None}, USER]
        )
        assert new == [USER]
        await answered(client, conversation, [*talk, SAID, MORE, SAID, MORE, MORE, nothing, USER, SAID, USER], nothing)
        _, new, _ = await answered(
            client, conversation, [*talk, SAID, MORE, SAID, MORE, MORE, nothing, USER, SAID, USER, MORE]
        )
        assert new == [MORE]  # a turn of no text may be left out
        assert [model.id async for model in client.models.list()] == ["student"]

    talk(play)


def test_a_stream_has_the_whole_turn() -> None:
    async def play(client: Any, conversation: Conversation) -> None:
        more = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
        stream, _, _ = await answered(client, conversation, [USER], **more)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == " two"
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [None, "stop"]
        assert [one.token for one in chunks[0].choices[0].logprobs.content] == [" t", "wo"]
        assert chunks[-1].usage.total_tokens == 10 and chunks[-1].choices == []
        calls = {"role": "assistant", "content": "", "tool_calls": [CALL, {**CALL, "id": "call00001"}]}
        stream, _, _ = await answered(client, conversation, [USER, SAID, MORE], calls, stream=True)
        [first, last] = [chunk async for chunk in stream]
        assert [(call.index, call.id) for call in first.choices[0].delta.tool_calls] == [
            (0, "call00000"),
            (1, "call00001"),
        ]
        assert last.choices[0].finish_reason == "tool_calls" and last.usage is None

    talk(play)


def test_calls_of_tools_and_their_results_are_told() -> None:
    async def play(client: Any, conversation: Conversation) -> None:
        calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        first, _, tools = await answered(client, conversation, [USER], calls, tools=[TOOL])
        assert tools == [TOOL]
        [choice] = first.choices
        [call] = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert (call.id, call.function.name) == ("call00000", "add") and json.loads(call.function.arguments) == {
            "a": 1,
            "b": "ü",
        }
        result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
        _, new, _ = await answered(client, conversation, [USER, choice.message, result], tools=[TOOL])
        assert new == [result]
        for number, changed in (
            (2, [USER, {**calls, "tool_calls": [{**CALL, "id": "other"}]}, result, SAID, MORE]),
            (3, [USER, choice.message, {**result, "tool_call_id": "other"}, SAID, MORE]),
        ):
            with pytest.raises(openai.ConflictError, match=f"message {number}, of the role"):
                await client.chat.completions.create(model="any", messages=changed, tools=[TOOL])
        with pytest.raises(openai.ConflictError, match="other tools than in the request before"):
            await client.chat.completions.create(model="any", messages=[USER, choice.message, result, SAID, MORE])

    talk(play)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"n": 2}, "n is 2, and here it is 1; leave it out"),
        ({"temperature": 0.7}, "temperature is 0.7, and here it is 0.8"),
        ({"stop": ["Observation:"]}, "stop is ['Observation:'], and here it is []"),
        ({"response_format": {"type": "json_object"}}, "response_format is {'type': 'json_object'}"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice is 'required'"),
        ({"top_logprobs": 3, "logprobs": True}, "top_logprobs is 3"),
        ({"extra_body": {"guided_regex": "a*"}}, "guided_regex is not offered here"),
        ({"extra_body": {"stream_options": "usage"}}, "stream_options is no JSON object"),
        ({"messages": []}, "messages or tools: "),
        ({"messages": [USER, SAID]}, "the last message is the assistant's"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b"}}]}]}, "text only"),
    ],
)  # fmt: skip
def test_what_is_not_offered_is_refused_with_one_sentence_and_the_conversation_goes_on(asked: dict, told: str) -> None:
    async def play(client: Any, conversation: Conversation) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**{"model": "any", "messages": [USER], **asked})
        assert told in refused.value.body["message"]  # type: ignore[index]
        fine = {"temperature": 0.8, "top_p": 1, "n": 1, "max_tokens": 9, "seed": 3, "tool_choice": "auto"}
        fine |= {"tool_choice": "none", "presence_penalty": None, "extra_body": {"top_k": -1, "min_p": None}}
        _, new, _ = await answered(client, conversation, [USER], **fine)
        assert new == [USER]

    talk(play, temperature=0.8)


def test_tools_without_a_parser_another_key_and_another_path_are_refused() -> None:
    async def play(client: Any, conversation: Conversation) -> None:
        with pytest.raises(openai.BadRequestError, match=r"set environment\.tool_parser"):
            await client.chat.completions.create(model="any", messages=[USER], tools=[TOOL])
        with pytest.raises(openai.NotFoundError, match="this endpoint answers POST /v1/chat/completions"):
            await client.responses.create(model="any", input="1+1=")
        for key in ("sk-other", "-"):
            other = client.with_options(api_key=key)
            with pytest.raises(openai.AuthenticationError, match="OPENAI_API_KEY"):
                await other.chat.completions.create(model="any", messages=[USER])
            with pytest.raises(openai.AuthenticationError, match="OPENAI_API_KEY"):
                await other.models.list()

    talk(play, tool_parser=None)


@pytest.mark.parametrize(
    ("messages", "more", "told"),
    [
        ([USER], {}, "a request without a message after the student's last turn"),
        ([MORE], {}, "message 1, of the role user, is not that of the request before"),
        ([{**USER, "content": "1+1= "}, SAID, MORE], {}, "message 1, of the role user"),
        ([USER, {**SAID, "content": "three"}, MORE], {}, "message 2, of the role assistant, is not the one that was sent"),
        ([USER, {**SAID, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": "{}"}}]}, MORE], {}, "message 2"),
        ([USER, SAID, SAID, MORE], {}, "a new message of the role assistant"),
        ([USER, SAID, MORE], {"tools": [TOOL]}, "other tools than in the request before"),
    ],
)  # fmt: skip
def test_what_does_not_continue_the_conversation_is_told_to_both_sides(messages: list, more: dict, told: str) -> None:
    async def play(client: Any, conversation: Conversation) -> None:
        await answered(client, conversation, [USER])
        with pytest.raises(openai.ConflictError) as refused:  # the client does not ask again
            await client.chat.completions.create(model="any", messages=messages, **more)
        assert told in refused.value.body["message"]  # type: ignore[index]
        with pytest.raises(BranchError, match=told):
            await conversation.asked()
        assert conversation._new.empty()

    talk(play)


def test_a_second_request_while_the_first_waits_is_a_branch_and_a_lost_one_is_made_again() -> None:
    async def play(client: Any, conversation: Conversation) -> None:
        lost = asyncio.ensure_future(client.chat.completions.create(model="any", messages=[USER]))
        await conversation.asked()
        for messages in ([USER], [MORE]):
            with pytest.raises(openai.ConflictError):
                await client.chat.completions.create(model="any", messages=messages)
            with pytest.raises(BranchError):
                await conversation.asked()
        lost.cancel()
        assert conversation._last is not None
        while conversation._last.readers:
            await asyncio.sleep(0.001)
        conversation.answer(SAID, TURN)  # nobody reads it
        again = await client.chat.completions.create(model="any", messages=[USER])
        assert again.choices[0].message.content == " two" and conversation._new.empty()
        _, new, _ = await answered(client, conversation, [USER, SAID, MORE])
        assert new == [MORE]

    talk(play)


def test_an_endpoint_listens_once_and_on_this_machine_only() -> None:
    async def main() -> None:
        endpoint = Endpoint(SamplingConfig(), None)
        first, second = await asyncio.gather(endpoint.url(), endpoint.url())
        assert first == second == await endpoint.url()
        port = int(first.removesuffix("/v1").rpartition(":")[2])
        listens = [one.laddr for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN]
        assert [place.ip for place in listens if place.port == port] == ["127.0.0.1"]

    asyncio.run(main())


def test_a_body_may_be_long_and_what_is_no_object_of_json_is_refused() -> None:
    async def main() -> None:
        endpoint = Endpoint(SamplingConfig(), None)
        url, (key, conversation) = await endpoint.url(), endpoint.open("0-1-2")
        headers = {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(url + "/", headers=headers) as client:
            half = json.dumps({"messages": [{"role": "user", "content": "\udce9"}]})
            for body, told in (
                ("{", "the body is no JSON: "),
                (200_000 * "[", "the body is no JSON: "),
                ("[1]", "the body is no JSON object"),
                (half, "text that is not Unicode"),
            ):
                async with client.post("chat/completions", data=body) as refused:
                    assert refused.status == 400 and told in (await refused.json())["error"]["message"]
            body = json.dumps({"messages": [{"role": "user", "content": 2**21 * "x"}]})
            asked = asyncio.ensure_future(client.post("chat/completions", data=body))
            await asyncio.wait_for(conversation.asked(), 30)
            conversation.answer(SAID, TURN)
            assert (await asked).status == 200

    asyncio.run(main())


def test_an_episode_that_is_over_answers_nothing_more() -> None:
    async def main() -> None:
        endpoint = Endpoint(SamplingConfig(), None)
        url, (key, conversation) = await endpoint.url(), endpoint.open("0-1-2")
        async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=30) as client:
            asked = asyncio.ensure_future(client.chat.completions.create(model="any", messages=[USER]))
            await conversation.asked()
            endpoint.close(key)
            with pytest.raises(openai.APIConnectionError) as lost:  # the request that waits ends at once
                await asked
            assert not isinstance(lost.value, openai.APITimeoutError)
            with pytest.raises(openai.AuthenticationError, match="no key of an episode that is running"):
                await client.chat.completions.create(model="any", messages=[USER])

    asyncio.run(main())
