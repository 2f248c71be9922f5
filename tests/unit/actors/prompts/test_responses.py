"""Responses of a data set: which of their tokens are trained on, where they end, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.config import PromptsConfig
from actors.errors import UserError
from actors.prompts.fingerprint import prompts_fingerprint
from actors.prompts.prompt_set import PromptSet, copied, load_prompts
from actors.prompts.responses import Ends, odd_tokens
from tests.tiny_models import make_tiny_tokenizer
from tests.tiny_tokenizers import byte_level, sentencepiece

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "ok?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "bye"},
]


def load(tmp_path: Path, records: list[Any], tokenizer: Any = None, **settings: Any) -> PromptSet:
    tokenizer = tokenizer or make_tiny_tokenizer()
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = PromptsConfig(path=str(file), **settings)
    end = tokenizer.eos_token_id
    return load_prompts(config, tokenizer, None, "prompts", ends=Ends([end], end))


def marked(prompts: PromptSet, tokenizer: Any, row: int = 0) -> list[tuple[str, bool]]:
    """The response as neighbours that are all trained, or all not."""
    own = prompts.responses
    assert own is not None
    found: list[tuple[str, bool]] = []
    begin, end = own.offsets[row : row + 2]
    for token, trained in zip(own.tokens[begin:end], own.trained[begin:end], strict=True):
        text = tokenizer.decode([token])
        if found and found[-1][1] == trained:
            found[-1] = (found[-1][0] + text, trained)
        else:
            found.append((text, bool(trained)))
    return found


def test_all_turns_of_the_assistant_are_trained_on_and_nothing_between_them(tmp_path: Path) -> None:
    tiny, joining = make_tiny_tokenizer(), byte_level()
    whole = {"prompt_field": "messages", "response_field": "messages"}
    found = load(tmp_path, [{"messages": TALK}, {"messages": TALK[1:3]}], **whole)
    assert found.texts == ["<system>Be brief.<eos><user>1+1=<eos><assistant>", "<user>1+1=<eos><assistant>"]
    talk = [("2<eos>", True), ("<user>ok?<eos><assistant>", False), ("yes<eos>", True)]
    assert marked(found, tiny) == talk and marked(found, tiny, 1) == [("2<eos>", True)]
    # This template writes a line break after an answer, which nobody is to learn; the last one has no use at all.
    other = load(tmp_path, [{"messages": TALK}], joining, **whole)
    between = ("\n<|user|>ok?<|end|>\n<|assistant|>", False)
    assert marked(other, joining) == [("2<|end|>", True), between, ("yes<|end|>", True)]
    # Earlier turns of a prompt are context; a response that is a text is one turn.
    split = {"prompt_field": "asked", "response_field": "answered"}
    records = [{"asked": TALK[:4], "answered": "yes"}, {"asked": "1+1=", "answered": TALK[2:5]}]
    found = load(tmp_path, records, **split)
    assert found.texts[0].endswith("2<eos><user>ok?<eos><assistant>") and marked(found, tiny) == [("yes<eos>", True)]
    assert marked(found, tiny, 1) == talk
    # Other responses to the same prompts are other contents; the same ones, elsewhere, are not.
    same = load(tmp_path, records, **split)
    changed = load(tmp_path, [records[0], {**records[1], "answered": "3"}], **split)
    assert prompts_fingerprint(found) == prompts_fingerprint(same) != prompts_fingerprint(changed)
    taken = found.take(np.array([1]))
    assert marked(taken, tiny) == talk


@pytest.mark.parametrize("make", [make_tiny_tokenizer, byte_level, sentencepiece])
def test_a_plain_text_is_the_prompts_tokens_and_then_its_own_with_an_end(tmp_path: Path, make: Any) -> None:
    tokenizer = make()
    found = load(tmp_path, [{"prompt": "17 + 28 =", "answer": " 45"}], tokenizer, response_field="answer", chat=False)
    assert found.responses is not None and found.responses.trained.all()
    *text, end = found.responses.tokens.tolist()
    assert end == tokenizer.eos_token_id
    whole = [*found.tokens_of(0).tolist(), *text]
    assert tokenizer.decode(whole, skip_special_tokens=True) == "17 + 28 = 45"


def test_a_longer_response_is_cut_and_says_so(tmp_path: Path) -> None:
    records = [{"messages": TALK}, {"messages": TALK[1:3]}]
    found = load(tmp_path, records, prompt_field="messages", response_field="messages")
    counts, written = copied(found, np.array([(4, 1, 0), (4, 0, 0)]), 7, 5)
    assert counts.lengths.tolist() == [2, 5] and counts.truncated.tolist() == [False, True]
    assert counts.context == (0, 3) and written.trained.tolist() == [True] * 4 + [False] * 3
    assert written.truncated.tolist() == [False, True] and written.ids.tolist() == [[4, 1, 0], [4, 0, 0]]
    assert set(written.policy_versions.tolist()) == {7} and counts.oldest_versions.tolist() == [7, 7]


LAST_ONLY = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("record", "settings", "told"),
    [
        ({"prompt": "a", "answer": ""}, {}, r'answer = "" \(it is empty\)'),
        ({"prompt": "a", "answer": []}, {}, r"no messages"),
        ({"prompt": "a", "answer": TALK[:2]}, {}, r"no message of the assistant's\), expected a text, or a list"),
        ({"prompt": "a", "answer": None}, {}, r"answer = null \(neither a text nor a list of messages\)"),
        ({"prompt": "a", "answer": [5]}, {}, r"answer = \[5\] \(message 2 is not an object"),
        (
            {"prompt": "1+1="},
            {"response_field": "prompt"},
            r'prompt = "1\+1=" \(no message of the assistant\'s\), expected a list of messages .* in one$',
        ),
        (
            {"prompt": TALK[2:5]},
            {"response_field": "prompt"},
            r"it begins with a message of the assistant's, which nobody has asked for",
        ),
        (
            {"prompt": TALK[1:2], "answer": [{"role": "assistant", "content": ""}]},
            {},
            r"message 2, of the assistant's, is",
        ),
        ({"prompt": "a", "answer": 7}, {"chat": False}, r"answer = 7, expected a string"),
        ({"prompt": "a"}, {}, r"prompts\.response_field: found answer, expected a field of .*line 1"),
        (
            {"prompt": TALK, "answer": "2"},
            {"response_field": "prompt", "chat_template_arguments": {"chat_template": LAST_ONLY}},
            r"line 1: found a conversation in which the chat template writes message 3 otherwise .*chat_template",
        ),
    ],
)
def test_what_cannot_be_a_response_is_one_error(
    tmp_path: Path, record: dict[str, Any], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        load(tmp_path, [record], **{"response_field": "answer", **settings})


def test_tokens_that_no_text_should_become_are_told(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    texts = ["2", "2<eos>", "2§", "<user>2", "2<eos>2§"]
    found = load(tmp_path, [{"prompt": "1+1=", "answer": text} for text in texts], response_field="answer")
    assert found.responses is not None
    odd = odd_tokens(found.responses, tokenizer, [tokenizer.eos_token_id])
    assert {token: rows.tolist() for token, rows in odd.items()} == {"<eos>": [1, 4], "<unk>": [2, 4], "<user>": [3]}
    # What all responses have is the chat template's, but for ends and unknown tokens.
    found = load(tmp_path, [{"prompt": "1+1=", "answer": "<user>2§"}] * 2, response_field="answer")
    assert found.responses is not None
    assert list(odd_tokens(found.responses, tokenizer, [tokenizer.eos_token_id])) == ["<unk>"]
