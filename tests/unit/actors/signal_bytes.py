"""The table of bytes in docs/objective.md: `python -m tests.unit.actors.signal_bytes` prints it.

Each signal is measured on what a teacher sends of a few trajectories; the formula has to give the same, and is then put
to the sizes of real models.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from actors.config import TeacherConfig
from actors.teacher.local import LocalTeacher
from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories, offsets_of
from tests.tiny_models import make_tiny_model

FORMULAS = {
    "sampled": ("4", lambda h, v, k: 4),
    "topk": ("4 + 8k", lambda h, v, k: 4 + 8 * k),
    "student_topk": ("4 + 12k", lambda h, v, k: 4 + 12 * k),
    "hidden": ("4 + 2H", lambda h, v, k: 4 + 2 * h),
    "full": ("4 + 4V", lambda h, v, k: 4 + 4 * v),
}
"""Bytes a token; for `student_topk` with the ids that the rollout actor sends along (4k)."""
MODELS = {"8B": (4096, 151_936, 64), "32B": (5120, 151_936, 64)}
"""H, V and k of Qwen3's two sizes."""
TINY = (32, 102, 8)


def measured(model: Path, signal: str) -> float:
    """Bytes a token of what travels to the learner on this signal's account, in a bfloat16 teacher."""
    count, k = 50, TINY[2]
    written = Trajectories(
        ids=np.array([(0, i, 0) for i in range(10)]),
        prompt_tokens=np.full(20, 7, np.int32),
        prompt_offsets=offsets_of([2] * 10),
        response_tokens=np.arange(6, 6 + count, dtype=np.int32),
        response_offsets=offsets_of([5] * 10),
        behaviour_logprobs=np.zeros(count, np.float32),
        policy_versions=np.zeros(count, np.int32),
        finish_reasons=np.zeros(10, np.uint8),
    )
    if signal == "student_topk":
        written = replace(written, support_ids=np.tile(np.arange(k, dtype=np.int32), (count, 1)))
    config = TeacherConfig(str(model), dtype="bfloat16", signal=signal, top_k=k)  # type: ignore[arg-type]
    scores: TeacherScores = LocalTeacher(config).score(written.ids, written)[1]
    sent = (scores.logprobs, scores.support_ids, scores.support_logprobs, scores.hidden, written.support_ids)
    return sum(array.nbytes for array in sent) / count


def table() -> str:
    """Markdown."""
    sizes = [f"{name} (H {h:,}, V {v:,}, k {k})" for name, (h, v, k) in MODELS.items()]
    lines = [f"| `signal` | bytes a token | {' | '.join(sizes)} | measured (H {TINY[0]}, V {TINY[1]}, k {TINY[2]}) |"]
    lines.append("|---" * (len(sizes) + 3) + "|")
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder, "m"), hidden=TINY[0], layers=1)
        for signal, (text, formula) in FORMULAS.items():
            found = measured(model, signal)
            assert found == formula(*TINY), (signal, found)
            lines.append(
                f"| `{signal}` | {text} | {' | '.join(f'{formula(*m):,}' for m in MODELS.values())} | {found:g} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
