"""What the campaign process itself reads before it starts: prompts, held-out prompts, tokenizer, verifier."""

from dataclasses import dataclass

from actors.errors import UserError
from actors.models import context_length, find_model, load_config, load_tokenizer, stop_token_ids
from actors.prompts import PromptSet, load_prompts
from actors.verifiers import make_verifier
from cluster.config import CampaignConfig
from cluster.evaluate import Evaluator


@dataclass
class Inputs:
    """Read, rendered with the student's tokenizer, and found good."""

    prompts: PromptSet
    evaluator: Evaluator | None
    stop_token_ids: list[int]
    vocabulary: int
    """Rows of the student's output layer."""


def max_prompt_tokens(config: CampaignConfig) -> int:
    """The student's context less the longest response. UserError where nothing is left for a prompt."""
    context = context_length(load_config(config.student.model, config.student.trust_remote_code, "student.model"))
    context = min(context, int(config.rollout.engine.get("max_model_len") or context))
    room = context - config.sampling.max_response_tokens
    if room < 1:
        raise UserError(
            "sampling.max_response_tokens",
            config.sampling.max_response_tokens,
            f"less than the context of {context} tokens",
        )
    return room


def read_inputs(config: CampaignConfig) -> Inputs:
    """Reads all of it. UserError: a file, a field or a token that is missing or wrong."""
    student = config.student
    tokenizer = load_tokenizer(student.model, student.trust_remote_code, "student.model")
    directory = find_model(student.model, "student.model", weights=False, code=student.trust_remote_code)
    stop = sorted({*stop_token_ids(directory, tokenizer), *config.sampling.stop_token_ids})
    if not stop:
        raise UserError(
            "sampling.stop_token_ids", "none", "at least one, since the student has no end-of-sequence token"
        )
    limit = max_prompt_tokens(config)
    model = load_config(student.model, student.trust_remote_code, "student.model")
    return Inputs(
        load_prompts(config.prompts, tokenizer, limit, "prompts"),
        _evaluator(config, tokenizer, limit, stop),
        stop,
        model.get_text_config().vocab_size,
    )


def _evaluator(config: CampaignConfig, tokenizer: object, limit: int, stop: list[int]) -> Evaluator | None:
    source = config.evaluation.prompts
    if source is None:
        return None
    held_out = load_prompts(source, tokenizer, limit, "evaluation.prompts")  # type: ignore[arg-type]
    if None in held_out.references:
        raise UserError(
            f"{source.path}, prompt {held_out.references.index(None) + 1}",
            f"no {source.reference_field}",
            "a reference answer for every held-out prompt (evaluation.prompts.reference_field)",
        )
    return Evaluator(
        held_out,
        tokenizer,
        make_verifier(config.evaluation.verifier, "evaluation.verifier"),
        seed=config.seed,
        max_response_tokens=config.sampling.max_response_tokens,
        stop_token_ids=stop,
        keep_trajectories=config.evaluation.keep_trajectories,
    )
