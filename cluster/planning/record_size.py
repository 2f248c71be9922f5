"""The size of a record (`record`), from a configuration."""

import shutil
from pathlib import Path

from actors.data.models import load_config
from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.planning.memory import ITEM_BYTES

MOST_SCORE_BYTES = 1 << 16
"""Of one token's scores from one teacher: a whole vocabulary of 16,384 tokens."""
GB = 1e9


def record_bytes(config: CampaignConfig) -> int:
    """Bytes of one response token at most, before compression: ids, log-probs, version, and each teacher's scores.

    UserError: a teacher sends its whole vocabulary, and that is large.
    """
    filters = config.sampling.top_p < 1 or config.sampling.top_k > 0
    nbytes = 4 + 4 + 4 + 1 + 4 * filters + 4 * config.student_support_size
    for name, teacher in config.teachers.items():
        own = 4
        if "topk" in teacher.signal:
            own += 8 * teacher.top_k
        elif teacher.signal in ("full", "hidden"):
            student = config.student
            model = (
                (student.source, student.trust_remote_code, "student.model")
                if teacher.signal == "full"
                else (teacher.source, teacher.trust_remote_code, f"teachers.{name}.model")
            )
            network = load_config(*model).get_text_config()
            own += (
                4 * network.vocab_size if teacher.signal == "full" else ITEM_BYTES[teacher.dtype] * network.hidden_size
            )
        if own > MOST_SCORE_BYTES:
            found = f"{teacher.signal}, {own:,} bytes a token, {nbytes_of(config, own) / GB:,.0f} GB for this campaign"
            expected = "topk, sampled or hidden, or record: false: a record keeps at most 65,536 bytes a token"
            raise UserError(f"teachers.{name}.signal", found, expected)
        nbytes += own
    return nbytes


def nbytes_of(config: CampaignConfig, token_bytes: int) -> int:
    """Of the whole campaign, where every response is as long as it may be."""
    tokens = config.trajectories_per_update * config.sampling.max_response_tokens
    return token_bytes * tokens * config.pipeline.updates


def record_sentence(config: CampaignConfig) -> str:
    """What a record takes, and what is free. UserError: see `record_bytes`."""
    token = record_bytes(config)
    whole = nbytes_of(config, token)
    at = next(path for path in (config.run_dir, *config.run_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(Path(at)).free
    told = f"{token:,} bytes a response token, at most {whole / GB:,.3g} GB for {config.pipeline.updates:,} updates"
    note = "; note: more than is free" if whole > free else ""
    return f"{told}, before compression; {free / GB:,.3g} GB free at {config.output_dir}{note}"
