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
from actors.environment.conversation import Asked, Conversations
from actors.environment.endpoint import Endpoint, completion

USER = {"role": "user", "content": "1+1="}
SAID = {"role": "assistant", "content": " two"}
MORE = {"role": "user", "content": "sure?"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
TURN = Turn(texts=[" t", "wo"], logprobs=[-0.5, -0.25], tokens=3, context_tokens=7, version=4)


def talk(
    play: Callable[[openai.AsyncOpenAI, Conversations], Coroutine[Any, Any, Any]],
    tool_parser: str | None = "hermes",
    **sampling: Any,
) -> Any:
    async def main() -> Any:
        endpoint = Endpoint(SamplingConfig(**sampling), tool_parser)
        url, (key, conversation) = await endpoint.url(), endpoint.open("0-1-2")
        async with openai.AsyncOpenAI(base_url=url, api_key=key) as client:
            return await asyncio.wait_for(play(client, conversation), 60)

    return asyncio.run(main())


async def both(
    client: openai.AsyncOpenAI, conversation: Conversations, messages: list, answer: dict = SAID, **more: Any
) -> tuple[Any, Asked]:
    """(what the client gets, the request)."""
    asked = asyncio.ensure_future(client.chat.completions.create(model="any", messages=messages, **more))
    read = asyncio.ensure_future(conversation.asked())
    await asyncio.wait({asked, read}, return_when=asyncio.FIRST_COMPLETED)
    if asked.done():  # refused
        await asked
    found = await read
    conversation.answer(answer, TURN)
    return await asked, found


async def answered(*arguments: Any, **more: Any) -> tuple[Any, list, list]:
    """(what the client gets, the request's new messages, its tools)."""
    told, found = await both(*arguments, **more)
    return told, found.new, found.tools


def test_a_client_gets_the_students_turns_and_only_new_messages_are_taken() -> None:
    async def play(client: Any, conversation: Conversations) -> None:
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
    async def play(client: Any, conversation: Conversations) -> None:
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


def test_a_turn_that_was_cut_ends_by_its_length() -> None:
    found = [completion("n", SAID, TURN._replace(cut=cut), False)["choices"][0] for cut in (False, True)]
    assert [choice["finish_reason"] for choice in found] == ["stop", "length"]


def test_calls_of_tools_and_their_results_are_told() -> None:
    async def play(client: Any, conversation: Conversations) -> None:
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
        for changed, more in (
            ([USER, {**calls, "tool_calls": [{**CALL, "id": "other"}]}, result, SAID, MORE], {"tools": [TOOL]}),
            ([USER, choice.message, {**result, "tool_call_id": "other"}, SAID, MORE], {"tools": [TOOL]}),
            ([USER, choice.message, result, SAID, MORE], {}),
        ):
            _, found = await both(client, conversation, changed, **more)
            assert found.after is None and len(found.new) == 5, "it begins another conversation"

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
    async def play(client: Any, conversation: Conversations) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**{"model": "any", "messages": [USER], **asked})
        assert told in refused.value.body["message"]  # type: ignore[index]
        fine = {"temperature": 0.8, "top_p": 1, "n": 1, "max_tokens": 9, "seed": 3, "tool_choice": "auto"}
        fine |= {"tool_choice": "none", "presence_penalty": None, "extra_body": {"top_k": -1, "min_p": None}}
        _, new, _ = await answered(client, conversation, [USER], **fine)
        assert new == [USER]

    talk(play, temperature=0.8)


def test_tools_without_a_parser_another_key_and_another_path_are_refused() -> None:
    async def play(client: Any, conversation: Conversations) -> None:
        with pytest.raises(openai.BadRequestError, match=r"set environment\.tool_parser"):
            await client.chat.completions.create(model="any", messages=[USER], tools=[TOOL])
        with pytest.raises(openai.NotFoundError, match="this endpoint answers POST /v1/chat/completions"):
            await client.responses.create(model="any", input="1+1=")
        key = client.api_key
        for wrong in ("sk-other", "-", key[:-1], key + "0", key.rpartition("-")[0], "sk-1" + key[4:]):
            other = client.with_options(api_key=wrong)
            with pytest.raises(openai.AuthenticationError, match="OPENAI_API_KEY"):
                await other.chat.completions.create(model="any", messages=[USER])
            with pytest.raises(openai.AuthenticationError, match="OPENAI_API_KEY"):
                await other.models.list()

    talk(play, tool_parser=None)


OTHER = {"role": "assistant", "content": "three"}


@pytest.mark.parametrize(
    ("messages", "more", "after", "new"),
    [
        ([USER, SAID, MORE, OTHER, USER], {}, 1, 1),
        ([USER, SAID, MORE, MORE], {}, 0, 2),  # another way on from the first turn
        ([USER, SAID, MORE], {}, 0, 1),  # the same once more
        ([USER], {}, None, 1),
        ([MORE], {}, None, 1),
        ([{**USER, "content": "1+1= "}, SAID, MORE], {}, None, 3),
        ([USER, OTHER, MORE], {}, None, 3),  # which the student has not said there
        ([USER, SAID, MORE, SAID, USER], {}, None, 5),
        ([USER, {**SAID, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": "{}"}}]}, MORE], {}, None, 3),
        ([USER, SAID, MORE], {"tools": [TOOL]}, None, 3),
    ],
)  # fmt: skip
def test_a_request_goes_on_from_the_turn_that_it_repeats_or_begins_another_conversation(
    messages: list, more: dict, after: int | None, new: int
) -> None:
    async def play(client: Any, conversation: Conversations) -> None:
        first, _ = await both(client, conversation, [USER])
        second, _ = await both(client, conversation, [USER, SAID, MORE], OTHER)
        third, found = await both(client, conversation, messages, **more)
        assert (found.after, len(found.new), found.new[-1]) == (after, new, messages[-1])
        assert len({first.id, second.id, third.id}) == 3

    talk(play)


def test_requests_that_wait_together_are_answered_in_their_order_and_of_two_that_are_alike_the_later_is_gone_on_from() -> (
    None
):
    async def play(client: Any, conversation: Conversations) -> None:
        one, two, given_up = (
            asyncio.ensure_future(client.chat.completions.create(model="any", messages=[asked]))
            for asked in (USER, USER, MORE)
        )
        while len(conversation._open) < 3:
            await asyncio.sleep(0.001)
        given_up.cancel()
        while conversation._open[-1].readers:
            await asyncio.sleep(0.001)
        for said in (SAID, OTHER):
            assert (await conversation.asked()).new == [USER]
            conversation.answer(said, TURN)
        assert {(await one).choices[0].message.content, (await two).choices[0].message.content} == {" two", "three"}
        _, found = await both(client, conversation, [USER, OTHER, MORE])
        assert (found.after, found.new) == (1, [MORE])
        for _ in range(2):
            _, found = await both(client, conversation, [MORE], SAID)
            assert found.after is None
        _, found = await both(client, conversation, [MORE, SAID, USER])
        assert found.after == 4
        for messages in ([USER], [USER, MORE], [USER]):
            await both(client, conversation, messages, {**SAID, "content": ""})
        _, found = await both(client, conversation, [USER, MORE, USER])  # without the turns of no text
        assert found.after == 7, "not the later turn, after which less is repeated"

    talk(play)


def test_a_request_whose_connection_was_lost_is_made_again() -> None:
    async def play(client: Any, conversation: Conversations) -> None:
        lost = asyncio.ensure_future(client.chat.completions.create(model="any", messages=[USER]))
        asked = await conversation.asked()
        lost.cancel()
        while asked.readers:
            await asyncio.sleep(0.001)
        conversation.answer(SAID, TURN)  # nobody reads it
        again = await client.chat.completions.create(model="any", messages=[USER])
        assert again.choices[0].message.content == " two" and conversation._waiting.empty()
        _, found = await both(client, conversation, [USER, SAID, MORE])
        assert (found.after, found.new) == (0, [MORE])

    talk(play)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_an_endpoint_listens_once_and_only_where_it_is_told_to(host: str) -> None:
    async def main() -> None:
        endpoint = Endpoint(SamplingConfig(), None, host)
        first, second = await asyncio.gather(endpoint.url(), endpoint.url())
        assert first == second == await endpoint.url()
        port = int(first.removesuffix("/v1").rpartition(":")[2])
        listens = [one.laddr for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN]
        assert [place.ip for place in listens if place.port == port] == [host]
        key, _ = endpoint.open("0-1-2")
        async with openai.AsyncOpenAI(base_url=first, api_key=key) as client:
            assert [model.id async for model in client.models.list()] == ["student"]
        headers = {"Authorization": f"Bearer {key}ü"}
        async with aiohttp.ClientSession(first + "/", headers=headers) as other, other.get("models") as refused:
            assert refused.status == 401

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
            scheme = {"Authorization": f"bearer {key}"}  # which HTTP compares without case
            asked = asyncio.ensure_future(client.post("chat/completions", data=body, headers=scheme))
            await asyncio.wait_for(conversation.asked(), 30)
            conversation.answer(SAID, TURN)
            assert (await asked).status == 200
            async with client.post("chat/completions", data="{}", headers={"Content-Encoding": "gzip"}) as refused:
                assert refused.status == 400 and "content-encoding" in (await refused.json())["error"]["message"]

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
