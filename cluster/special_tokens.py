"""Tokens with a role: what ends a response or a turn, and which tokens are masked for their role."""

from typing import Any

from actors.data.models import find_model, vocabulary_rows
from actors.data.tokenizer import load_tokenizer, stop_token_ids, template_token_ids, turn_end
from actors.errors import UserError
from actors.prompts.responses import Ends
from actors.teacher.backends import backend_of
from actors.teacher.turn_ends import TurnEnds
from cluster.config import CampaignConfig


def student_stop_tokens(config: CampaignConfig) -> list[int]:
    """The tokens at which a response ends: the student's, and the configured ones. UserError: none, or one without a row."""
    student, key, configured = config.student, "student.model", config.sampling.stop_token_ids
    rows = vocabulary_rows(student.source, student.trust_remote_code, key)
    directory = find_model(student.source, key, weights=False, code=student.trust_remote_code)
    its = stop_token_ids(directory, load_tokenizer(student.source, student.trust_remote_code, key), rows, key)
    refuse_unknown(configured, rows, "sampling.stop_token_ids")
    if not its and not configured:
        raise UserError(
            "sampling.stop_token_ids", "none", "at least one, since the student has no end-of-sequence token"
        )
    return sorted({*its, *configured})


def refuse_unknown(ids: list[int], rows: int, key: str) -> None:
    """UserError: one of the tokens of this key is none of the student's, which are below `rows`."""
    if unknown := [token for token in ids if not 0 <= token < rows]:
        raise UserError(key, unknown[0], f"ids of the student's tokens, 0 to {rows - 1}")


def turn_ends(config: CampaignConfig, name: str) -> TurnEnds | None:
    """What ends a turn of the student and of a teacher with its vocabulary. None: the same, or it is not known.

    UserError: the teacher has no row for the student's end token, and sends its whole vocabulary.
    """
    student, teacher, key = config.student, config.teachers[name], f"teachers.{name}.model"
    if not backend_of(teacher).has_model_files or teacher.tokenizer is not None:
        return None  # unknown; or its own tokenizer translates the end
    found = [
        turn_end(
            find_model(model.source, where, weights=False, code=model.trust_remote_code),
            load_tokenizer(model.source, model.trust_remote_code, where),
            config.prompts.chat,
            config.prompts.chat_template_arguments,
            rows=vocabulary_rows(model.source, model.trust_remote_code, where),
            key=where,
        )
        for model, where in ((student, "student.model"), (teacher, key))
    ]
    if None in found or found[0] == found[1]:
        return None
    ends = TurnEnds(*(token for token in found if token is not None))
    rows = vocabulary_rows(teacher.source, teacher.trust_remote_code, key)
    if ends.student >= rows and teacher.signal in ("full", "hidden"):
        expected = (
            "sampled, topk or student_topk where the teacher has no row for the token that ends the student's turn"
        )
        raise UserError(f"teachers.{name}.signal", teacher.signal, expected)
    return ends


def response_ends(config: CampaignConfig, tokenizer: Any, stop: list[int]) -> Ends:
    """How the responses of a data set end: with the token that ends the student's turns."""
    student, prompts = config.student, config.prompts
    directory = find_model(student.source, "student.model", weights=False, code=student.trust_remote_code)
    rows = vocabulary_rows(student.source, student.trust_remote_code, "student.model")
    arguments = prompts.chat_template_arguments
    return Ends(stop, turn_end(directory, tokenizer, prompts.chat, arguments, rows=rows) or stop[0])


def masked_role_token_ids(config: CampaignConfig, tokenizer: Any, stop: list[int]) -> list[int]:
    """The tokens of `learner.objective.masked_token_roles`, ascending. stop: those at which a response ends. UserError: a
    chat template that writes none."""
    roles = config.learner.objective.masked_token_roles
    template = []
    if "template" in roles:
        written = template_token_ids(tokenizer, "student.model", config.prompts.chat_template_arguments)
        template = [token for token in written if token not in stop]
    if "template" in roles and not template:
        raise UserError(
            "learner.objective.masked_token_roles", "template", "a chat template that writes special tokens of its own"
        )
    return sorted([*(stop if "end_of_sequence" in roles else []), *template])
