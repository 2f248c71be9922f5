"""The next prompt of an episode: the student's own ids, and what the chat template writes after them.

The templates behave between turns as those of the families that users have (tests/data/chat_templates).
"""

from typing import Any

import pytest

from actors.environment.continuation import LONGEST_KEPT, Continuation, checked
from tests.documented import ROOT
from tests.tiny_models import make_tiny_tokenizer

ENDS = {
    "gemma": "<end_of_turn>",
    "llama3_1": "<|eot_id|>",
    "mistral": "</s>",
    "deepseek_r1": "<|end|>",
}
"""Template -> the token that ends a turn, where it is not `<|im_end|>`."""
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
           "<start_of_turn>", "<end_of_turn>", "</s>", "[INST]", "[/INST]", "<|end|>", "<|User|>", "<|Assistant|>"]  # fmt: skip
USER = [{"role": "user", "content": "The answer?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]
MORE = [{"role": "user", "content": "No: higher."}]
RESULT = [{"role": "tool", "content": "4", "tool_call_id": "call00000"}]
TWO_RESULTS = [*RESULT, {"role": "tool", "content": "5", "tool_call_id": "call00001"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}]
CHANGES = "once more messages follow"
"""An error about a template that writes earlier turns otherwise."""


def continuation(family: str, **arguments: Any) -> Continuation:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL, "bos_token": "<|begin|>", "eos_token": "</s>"})
    tokenizer.chat_template = (ROOT / "tests/data/chat_templates" / f"{family}.jinja").read_text("utf-8")
    ends = {tokenizer.convert_tokens_to_ids(ENDS.get(family, "<|im_end|>"))}
    return Continuation(tokenizer, frozenset(ends), arguments)


@pytest.mark.parametrize(
    ("family", "first", "new", "tools", "arguments", "wrong"),
    [
        *[(family, first, new, tools, {}, "")
          for family in ("qwen2_5", "llama3_1") for first in (USER, SYSTEM)
          for new, tools in ((MORE, None), (RESULT, TOOLS))],
        ("qwen2_5", SYSTEM, TWO_RESULTS, TOOLS, {}, ""),
        ("chatml", SYSTEM, MORE, None, {}, ""),
        ("smollm2", USER, MORE, None, {}, ""),
        ("smollm2", USER, RESULT, None, {}, ""),
        ("gemma", USER, MORE, None, {}, ""),
        ("gemma", USER, RESULT, None, {}, "refuses messages of user, assistant, tool"),
        ("gemma", SYSTEM, MORE, None, {}, "System role not supported"),
        ("qwen3", USER, RESULT, TOOLS, {}, ""),  # the reasoning stays until the user writes again
        ("qwen3", USER, TWO_RESULTS, TOOLS, {}, ""),
        ("qwen3", USER, MORE, None, {}, "<think>"),
        ("qwen3", USER, MORE, None, {"enable_thinking": False}, "<think>"),  # the empty reasoning goes, too
        ("deepseek_r1", USER, MORE, None, {}, "<think>"),
        ("deepseek_r1", USER, RESULT, TOOLS, {}, "<think>"),
        ("mistral", USER, MORE, None, {}, ""),
        ("mistral", SYSTEM, MORE, None, {}, "Be brief."),  # the system message moves to the last message
        ("mistral", USER, MORE, TOOLS, {}, "AVAILABLE_TOOLS"),  # the tools do
        ("mistral", USER, TWO_RESULTS, TOOLS, {}, ""),
    ],
)  # fmt: skip
def test_it_is_found_where_a_template_does_more_than_append(
    family: str, first: list, new: list, tools: Any, arguments: dict, wrong: str
) -> None:
    found = continuation(family, **arguments).difference(first, new, tools)
    if not wrong:
        assert found is None, found
    else:
        assert found is not None and wrong in found, found
        assert CHANGES in found or "refuses" in found


@pytest.mark.parametrize(
    ("family", "new", "tools"),
    [("qwen2_5", TWO_RESULTS, TOOLS), ("qwen2_5", MORE, None), ("chatml", MORE, None), ("smollm2", MORE, None),
     ("llama3_1", RESULT, TOOLS), ("gemma", MORE, None), ("qwen3", TWO_RESULTS, TOOLS)],
)  # fmt: skip
def test_prompt_own_tokens_and_what_follows_are_the_whole_conversation_of_the_template(
    family: str, new: list, tools: Any
) -> None:
    """Where the student's tokens are those that the tokenizer makes of its text; no other tokens could be compared."""
    one, tokenizer = continuation(family), continuation(family).tokenizer
    text, end = "It is 7.", next(iter(one.stop_token_ids))
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [*one.prompt(USER, tools), *own, end, *one.after(USER, new, end, tools)]
    conversation = [*USER, {"role": "assistant", "content": text}, *new]
    assert tokenizer.decode(ids) == one.render(conversation, tools)
    assert ids == one.prompt(conversation, tools)
    again = [*ids, *own, end, *one.after(USER, MORE, end, tools)]  # and so for the next turn
    if family != "qwen3":
        assert again == one.prompt([*conversation, {"role": "assistant", "content": text}, *MORE], tools)


def test_the_end_of_a_turn_is_neither_doubled_nor_left_out() -> None:
    one = continuation("chatml")
    tokenizer = one.tokenizer
    end, other, letter = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>", "7"))
    both = Continuation(tokenizer, frozenset({end, other, letter}))
    rest = "\n<|im_start|>user\nNo: higher.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(both.after(USER, MORE, end)) == rest
    assert (
        tokenizer.decode(both.after(USER, MORE, other)) == rest
    )  # a special token that ends turns stands in its place
    assert tokenizer.decode(both.after(USER, MORE, letter)) == "<|im_end|>" + rest  # text that only stops the sampler
    # A template that ends turns with something that is no stop token: all of it follows.
    assert tokenizer.decode(Continuation(tokenizer, frozenset({other})).after(USER, MORE, other)) == "<|im_end|>" + rest


def test_a_call_before_the_results_is_written_where_a_template_demands_one() -> None:
    one = continuation("mistral")
    end = next(iter(one.stop_token_ids))
    results = checked([{"role": "tool", "content": "4"}, {"role": "tool", "content": "5"}], [{"id": "abcdefghi"}])
    assert [message["tool_call_id"] for message in results] == ["abcdefghi", "call00000"]
    text = one.tokenizer.decode(one.after(USER, results, end, TOOLS))
    assert text.startswith('[TOOL_RESULTS] {"content": 4, "call_id": "abcdefghi"}') and "TOOL_CALLS" not in text


def test_what_follows_is_rendered_once_and_depends_on_all_that_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    one, rendered = continuation("qwen2_5"), []
    end, other = next(iter(one.stop_token_ids)), one.tokenizer.convert_tokens_to_ids("7")
    asked: list[tuple[Any, ...]] = [
        (USER, MORE, end), (USER, MORE, other), (USER, RESULT, end, TOOLS), (USER, TWO_RESULTS, end, TOOLS), (SYSTEM, MORE, end),
    ]  # fmt: skip
    expected = [continuation("qwen2_5").after(*call) for call in asked]
    render = Continuation.render
    monkeypatch.setattr(Continuation, "render", lambda *a, **k: (rendered.append(a), render(*a, **k))[1])
    assert [one.after(*call) for call in asked] == expected
    count = len(rendered)
    assert [one.after(*call) for call in asked] == expected and len(rendered) == count
    long = [{"role": "user", "content": LONGEST_KEPT * "No: higher. "}]
    assert one.after(USER, long, end) == continuation("qwen2_5").after(USER, long, end)
    no_json = [{"role": "user", "content": "No: higher.", "tried": {1, 2}}]
    assert one.after(USER, no_json, end) == continuation("qwen2_5").after(USER, MORE, end)
    assert len(one._following) == len(asked), "what is long, or no JSON, is not kept"


@pytest.mark.parametrize("how", ["as it is", "pads", "truncates", "splits special tokens", "of another class"])
def test_a_text_has_the_ids_that_the_tokenizer_gives_it_whatever_it_is_set_to(how: str) -> None:
    one = continuation("qwen2_5")
    tokenizer = one.tokenizer
    text = "\n<|im_start|>user\nNo, é€\U0001f642: higher.  <|im_end|>\n"
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    if how == "pads":
        tokenizer.backend_tokenizer.enable_padding(length=99)
    elif how == "truncates":
        tokenizer.backend_tokenizer.enable_truncation(3)
    elif how == "splits special tokens":
        tokenizer.split_special_tokens = True
        split = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert split != expected
        tokenizer.backend_tokenizer.encode_special_tokens, expected = False, split
    elif how == "of another class":

        class Other(type(tokenizer)):
            def _encode_plus(self, text: Any, *arguments: Any, **keywords: Any) -> Any:
                return super()._encode_plus(f"{text} ", *arguments, **keywords)

        tokenizer.__class__, expected = Other, [*expected, *tokenizer(" ", add_special_tokens=False)["input_ids"]]
    assert one._plain == (how != "of another class")
    assert one._ids(text) == expected


def test_the_mark_is_none_of_the_messages() -> None:
    one = continuation("chatml")
    end = next(iter(one.stop_token_ids))
    new = [{"role": "user", "content": "…0… and …1…"}]
    follows = one.tokenizer.decode(one.after([{"role": "user", "content": "…2…"}], new, end))
    assert follows.startswith("\n<|im_start|>user\n") and follows.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [(None, "neither"), ([], "no messages"), ([{"role": "user"}], "no content"), ({"role": "user"}, "neither"),
     ([{"role": "assistant", "content": "x"}, *USER], "role 'assistant'"), ([7], "not an object"), ("", "empty")],
)  # fmt: skip
def test_messages_of_another_form_are_told(messages: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        checked(messages)
    assert checked("Again?") == [{"role": "user", "content": "Again?"}]
