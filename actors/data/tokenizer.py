"""Loads a model's tokenizer, finds its stop and template tokens, and compares it with another model's.

`key` is always the configuration key that names the model, for example "student.model".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from actors.data.models import as_user_error, find_model
from actors.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def load_tokenizer(model: str, trust_remote_code: bool, key: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer. UserError: see `find_model`; or tokenizer files are missing or cannot be read."""
    from transformers import AutoTokenizer

    path = find_model(model, key, weights=False, code=trust_remote_code)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(key, f"{path} without a tokenizer", "tokenizer.json beside config.json")
    with as_user_error(key, path, "a tokenizer that transformers can read"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def stop_token_ids(model_dir: Path | str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response, ascending: the tokenizer's eos, and those of generation_config.json if it exists.

    UserError: generation_config.json is no JSON object, or its eos_token_id is neither an id nor a list of ids.
    """
    found = {tokenizer.eos_token_id}
    file = Path(model_dir) / "generation_config.json"
    if file.is_file():
        with as_user_error(str(file), "no JSON object", "a JSON object, or no such file"):
            eos = dict(json.loads(file.read_text("utf-8"))).get("eos_token_id")
        for token in eos if isinstance(eos, list) else [eos]:
            if token is not None and type(token) is not int:
                raise UserError(str(file), f"eos_token_id {eos!r}", "the id of a token, or a list of ids")
            found.add(token)
    return sorted(found - {None})  # a tokenizer may have no eos, and the file may say null


def end_token_id(tokenizer: PreTrainedTokenizerBase, chat: bool) -> int | None:
    """The token that ends an answer. In a chat: the special token that the template writes after it. Else: eos."""
    if not chat or not tokenizer.chat_template:
        return tokenizer.eos_token_id
    # "…" marks the answer: templates do not write it themselves, and do not strip it as they strip white space.
    messages = [{"role": role, "content": "…"} for role in ("user", "assistant")]
    after = str(tokenizer.apply_chat_template(messages, tokenize=False)).rpartition("…")[2]
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    written = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((token for token in written if token in special), tokenizer.eos_token_id)


def template_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Added tokens that the chat template writes around a question and its answer, ascending; [] without a template."""
    if not tokenizer.chat_template:
        return []
    messages = [{"role": role, "content": "…"} for role in ("user", "assistant")]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    opened = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    # The tokens of the content itself are subtracted: they are not the template's.
    content, *around = tokenizer(["…", written, opened], add_special_tokens=False)["input_ids"]
    added = set(tokenizer.get_added_vocab().values()) - set(content)
    return sorted({token for row in around for token in row} & added)


def turn_end(model_dir: Path | str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> int | None:
    """The token with which the model ends its turn: the chat template's, if generation stops at it, else eos.

    None: the model has none. UserError: see `stop_token_ids`.
    """
    stop = stop_token_ids(model_dir, tokenizer)
    ends = [end_token_id(tokenizer, chat), tokenizer.eos_token_id, *stop]
    return next((token for token in ends if token in stop), None)


def check_tokenizers_agree(
    student_tok: PreTrainedTokenizerBase,
    teacher_tok: PreTrainedTokenizerBase,
    student_config: PreTrainedConfig,
    teacher_config: PreTrainedConfig,
    key: str,
) -> list[str]:
    """UserError, on the teacher's `key`, unless the teacher can score the student's token ids. Returns remarks.

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
    for whose, config, most in (("student", student_config, max(ours.values())), ("teacher", teacher_config, shared)):
        size = config.get_text_config().vocab_size
        if most >= size:
            expected = f"at least {most + 1}, as the tokenizer has"
            raise UserError(key, f"a {whose} model with a vocabulary of {size} tokens", expected)
    absent = sorted(added.keys() - theirs.keys(), key=lambda token: added[token])
    unknown = ", ".join(map(repr, absent[:4])) + (" …" if len(absent) > 4 else "")
    return [f"it has no token {unknown}, so these have no scores"] if absent else []


def template_difference(student_tok: PreTrainedTokenizerBase, teacher_tok: PreTrainedTokenizerBase) -> str | None:
    """A remark if the teacher's chat template differs. Not an error: the teacher reads the student's rendered prompts."""
    if not student_tok.chat_template or not teacher_tok.chat_template:
        return None
    ours, theirs = (
        tok.apply_chat_template([{"role": "user", "content": "…"}], tokenize=False, add_generation_prompt=True)
        for tok in (student_tok, teacher_tok)
    )
    return None if ours == theirs else f"the teacher's own chat template writes {theirs!r}, the student's {ours!r}"
