"""Everything that can be known of a campaign before it starts, in a few seconds."""

from collections.abc import Callable, Iterator
from pathlib import Path

from actors.errors import UserError
from actors.models import (
    check_tokenizers_agree,
    check_weights,
    context_length,
    find_model,
    load_config,
    load_tokenizer,
)
from actors.prompts import load_prompts
from actors.verifiers import make_verifier
from cluster.config import CampaignConfig


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


def checks(config: CampaignConfig, *, offline: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """(what is checked, the check); a check returns what it found, or raises UserError.

    Offline, only the configuration and what lies on this machine is looked at: models and prompts that are not here
    are left for the cluster to find, and no cluster is asked.
    """

    def here(path: str) -> bool:
        return not offline or Path(path).exists()

    def student() -> str:
        student = config.student
        tokenizer = load_tokenizer(student.model, student.trust_remote_code, "student.model")
        check_weights(find_model(student.model, "student.model", code=student.trust_remote_code), "student.model")
        return f"{len(tokenizer)} tokens, prompts of at most {max_prompt_tokens(config)}"

    def teacher(name: str) -> str:
        key, teacher = f"teachers.{name}.model", config.teachers[name]
        check_weights(find_model(teacher.model, key, code=teacher.trust_remote_code), key)
        if not here(config.student.model):
            return "weights complete"
        check_tokenizers_agree(
            load_tokenizer(config.student.model, config.student.trust_remote_code, "student.model"),
            load_tokenizer(teacher.model, teacher.trust_remote_code, key),
            load_config(config.student.model, config.student.trust_remote_code, "student.model"),
            load_config(teacher.model, teacher.trust_remote_code, key),
            key,
        )
        return "weights complete, the student's tokenizer"

    def prompts(key: str) -> str:
        source = config.prompts if key == "prompts" else config.evaluation.prompts
        assert source is not None
        tokenizer = load_tokenizer(config.student.model, config.student.trust_remote_code, "student.model")
        return f"{len(load_prompts(source, tokenizer, max_prompt_tokens(config), key))} prompts"

    def verifier() -> str:
        make_verifier(config.evaluation.verifier, "evaluation.verifier")
        return config.evaluation.verifier.name

    def cluster() -> str:
        from cluster.ray_cluster import check_cluster, connected, refuse_relative_output

        refuse_relative_output(config)
        with connected(config) as private:
            needed = check_cluster(config, private)
        return ", ".join(f"{role} {n} x ({r.cpus:g} CPUs, {r.gpus:g} GPUs)" for role, (n, r) in needed.items())

    if here(config.student.model):
        yield "student", student
    for name, source in config.teachers.items():
        if here(source.model):
            yield f"teacher {name}", lambda name=name: teacher(name)  # type: ignore[misc]
    sources = {"prompts": config.prompts, "evaluation.prompts": config.evaluation.prompts}
    for key, prompt_source in sources.items():
        if prompt_source is not None and here(config.student.model) and here(prompt_source.path):
            yield key, lambda key=key: prompts(key)  # type: ignore[misc]
    if config.evaluation.prompts is not None:
        yield "verifier", verifier
    if not offline:
        yield "cluster", cluster
