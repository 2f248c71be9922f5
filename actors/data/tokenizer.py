"""Loads a model's tokenizer, finds its stop and template tokens, and compares it with another model's.

`key` is always the configuration key that names the model, for example "student.model".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.data.models import as_user_error, find_model
from actors.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

CONTENT = "…"
"""Stands for a message: templates do not write it themselves, and do not strip it as they strip white space."""
OF_ONE_PROMPT = ("add_generation_prompt", "continue_final_message", "tokenize")
"""Arguments of a chat template that say where a prompt ends."""
MOST_IDS = 2**31
"""Token ids are below this, whatever the model: they travel as int32."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def load_tokenizer(model: str, trust_remote_code: bool, key: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer. UserError: see `find_model`; or tokenizer files are missing or cannot be read."""
    from transformers import AutoTokenizer

    path = find_model(model, key, weights=False, code=trust_remote_code)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(key, f"{path} without a tokenizer", "tokenizer.json beside config.json")
    with as_user_error(key, path, "a tokenizer that transformers can read"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def stop_token_ids(
    model_dir: Path | str, tokenizer: PreTrainedTokenizerBase, rows: int = MOST_IDS, key: str = "student.model"
) -> list[int]:
    """Tokens that end a response, ascending: the tokenizer's eos, and those of generation_config.json if it exists.

    rows: of the model's output layer; ids in its padding rows are accepted, as some models list them. UserError: an end
    without a row, which is never sampled; generation_config.json is no JSON object, or its eos_token_id is neither an id
    nor a list of ids.
    """
    found = {tokenizer.eos_token_id}
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id >= rows:
        what = f"the end-of-sequence token {tokenizer.eos_token!r} with id {tokenizer.eos_token_id}"
        raise UserError(key, what, f"a token that the model has a row for, 0 to {rows - 1}")
    file = Path(model_dir) / "generation_config.json"
    if file.is_file():
        with as_user_error(str(file), "no JSON object", "a JSON object, or no such file"):
            content = json.loads(file.read_text("utf-8"))
        if not isinstance(content, dict):
            raise UserError(str(file), "no JSON object", "a JSON object, or no such file")
        eos = content.get("eos_token_id")
        for token in eos if isinstance(eos, list) else [eos]:
            if token is not None and type(token) is not int:
                raise UserError(str(file), f"eos_token_id {eos!r}", "the id of a token, or a list of ids")
            if token is not None and not 0 <= token < rows:
                raise UserError(str(file), f"eos_token_id {token}", f"ids that the model has rows for, 0 to {rows - 1}")
            found.add(token)
    return sorted(found - {None})  # a tokenizer may have no eos, and the file may say null


def end_token_id(
    tokenizer: PreTrainedTokenizerBase, chat: bool, arguments: Mapping[str, Any] | None = None
) -> int | None:
    """The token that ends an answer. In a chat: the special token that the template writes after it. Else: eos.

    arguments: of the chat template, as prompts have them. Where the template cannot say, as one that refuses messages of
    the assistant, the token is eos, too.
    """
    written = _conversation(tokenizer, ("user", "assistant"), arguments) if chat else None
    if written is None:
        return tokenizer.eos_token_id
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    after = tokenizer(written.rpartition(CONTENT)[2], add_special_tokens=False)["input_ids"]
    return next((token for token in after if token in special), tokenizer.eos_token_id)


def template_token_ids(
    tokenizer: PreTrainedTokenizerBase, key: str = "student.model", arguments: Mapping[str, Any] | None = None
) -> list[int]:
    """Added tokens that the chat template writes around a question and its answer, ascending; [] without a template.

    arguments: see `end_token_id`. UserError: the template accepts neither a question nor a question with its answer.
    """
    if not tokenizer.chat_template:
        return []
    written = _conversation(tokenizer, ("user", "assistant"), arguments)
    opened = _conversation(tokenizer, ("user",), arguments, add_generation_prompt=True)
    texts = [text for text in (written, opened) if text is not None]
    if not texts:
        found = "a chat template that accepts neither a message of the user nor one after a system message"
        raise UserError(key, found, "one that does, so that its tokens can be found")
    # The tokens of the content itself are subtracted: they are not the template's.
    content, *around = tokenizer([CONTENT, *texts], add_special_tokens=False)["input_ids"]
    added = set(tokenizer.get_added_vocab().values()) - set(content)
    return sorted({token for row in around for token in row} & added)


def turn_end(
    model_dir: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    chat: bool,
    arguments: Mapping[str, Any] | None = None,
    *,
    rows: int = MOST_IDS,
    key: str = "student.model",
) -> int | None:
    """The token with which the model ends its turn: the chat template's, if generation stops at it, else eos.

    arguments: see `end_token_id`. None: the model has none. UserError: see `stop_token_ids`.
    """
    stop = stop_token_ids(model_dir, tokenizer, rows, key)
    ends = [end_token_id(tokenizer, chat, arguments), tokenizer.eos_token_id, *stop]
    return next((token for token in ends if token in stop), None)


def _conversation(
    tokenizer: PreTrainedTokenizerBase,
    roles: Sequence[str],
    arguments: Mapping[str, Any] | None,
    *,
    add_generation_prompt: bool = False,
) -> str | None:
    """The text of a conversation in which every message is CONTENT. None: no template, or it accepts no such messages.

    Templates are programs of the model's author: some demand a system message first, some refuse an answer, and the
    template that `arguments` name may be the student's only. Each is tried with less until it writes the messages.
    """
    given = {name: value for name, value in (arguments or {}).items() if name not in OF_ONE_PROMPT}
    for more in (given, {}):
        for begun in ((), ("system",)):
            messages = [{"role": role, "content": CONTENT} for role in (*begun, *roles)]
            how: dict[str, Any] = {**more, "tokenize": False, "add_generation_prompt": add_generation_prompt}
            try:
                text = str(tokenizer.apply_chat_template(messages, **how)) if tokenizer.chat_template else ""
            except Exception:  # whatever a template raises; where a prompt meets it, `load_prompts` tells it
                continue
            if CONTENT in text:  # else it leaves messages out, or `chat_template` names a template of the student's
                return text
    return None


def check_tokenizers_agree(
    student_tok: PreTrainedTokenizerBase,
    teacher_tok: PreTrainedTokenizerBase,
    student_config: PreTrainedConfig,
    teacher_config: PreTrainedConfig,
    key: str,
) -> list[str]:
    """UserError, on the `key` of the teacher or on student.model, unless the teacher can score the student's token ids. Returns remarks.

    It can if no id is one token to the student and another to the teacher, if it has all tokens of the student but added
    ones (a missing one has no scores), and if both models have an output row for each token that both know. Not
    compared: which tokens begin or end a text, or pad it; further tokens of the teacher, and padding rows of the models'
    vocabularies (for example 151936 and 152064 rows).
    """
    ours, theirs = student_tok.get_vocab(), teacher_tok.get_vocab()
    by_id, added = {id_: token for token, id_ in theirs.items()}, student_tok.get_added_vocab()
    differing = [
        (id_, token)
        for token, id_ in ours.items()
        if theirs.get(token, id_) != id_
        or by_id.get(id_, token) != token
        or (token not in theirs and token not in added)
    ]
    if differing:
        id_, token = min(differing)
        found = f"token {theirs[token]}" if token in theirs else "not in the vocabulary"
        raise UserError(
            key,
            f"a tokenizer in which {token!r} is {found}",
            f"the student's tokenizer, in which it is token {id_} ({len(differing)} of {len(ours)} tokens differ), "
            "or its own named in `tokenizer`",
        )
    shared = max(id_ for token, id_ in ours.items() if token in theirs)
    sides = (("student", "student.model", student_config, max(ours.values())), ("teacher", key, teacher_config, shared))
    for whose, where, config, most in sides:
        size = config.get_text_config().vocab_size
        if most >= size:
            expected = f"at least {most + 1}, as the tokenizer has"
            raise UserError(where, f"a {whose} model with a vocabulary of {size} tokens", expected)
    absent = sorted(added.keys() - theirs.keys(), key=lambda token: added[token])
    unknown = ", ".join(map(repr, absent[:4])) + (" …" if len(absent) > 4 else "")
    return [f"it has no token {unknown}, so these have no scores"] if absent else []


def template_difference(
    student_tok: PreTrainedTokenizerBase,
    teacher_tok: PreTrainedTokenizerBase,
    arguments: Mapping[str, Any] | None = None,
) -> str | None:
    """A remark if the teacher's chat template differs. Not an error: the teacher reads the student's rendered prompts.

    arguments: see `end_token_id`. None, too, where one of them accepts no message of a user.
    """
    ours, theirs = (
        _conversation(tok, ("user",), arguments, add_generation_prompt=True) for tok in (student_tok, teacher_tok)
    )
    if ours is None or theirs is None or ours == theirs:
        return None
    return f"the teacher's own chat template writes {theirs!r}, the student's {ours!r}"
