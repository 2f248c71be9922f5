"""What is measured of one update while it is taken: the metrics of metrics.jsonl that the learner knows (docs/metrics.md).

Nothing here needs a pass over [n, V] that training does not make anyway: columns of one number a token are collected,
and the most likely tokens of student and teacher are compared at a few tokens of each chunk.
Shapes: N tokens of the update, n of a micro-batch or chunk, B trajectories, K support, V vocabulary.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.trajectory import FINISH_REASONS, TeacherScores, Trajectories
from learner.collate import Part
from learner.hidden_states import mixture_logprobs
from learner.objective.policy_gradient import effective_sample_size
from learner.student.sharding import Ranks

COMPARED = 64
"""At about so many tokens of a chunk, evenly spread, the most likely tokens are compared."""
TOP = 8
"""Of so many most likely tokens the overlap is taken."""
LOG_RATIO_BIN, LOG_RATIO_BINS = 0.5, 17
"""The histogram of log-ratios: the bins' width in nats, and how many, around 0; the outermost have all that lies beyond."""
AGREEMENT = ("top1_agreement", "top8_overlap", "student_support_mass", "teacher_support_mass")


def agreement(logprobs_nV: Tensor, part: Part, rows: slice, *, named_by_student: bool = False) -> Tensor:
    """[1, 5] sums over some tokens of a chunk: those of AGREEMENT (NaN what is not known), and how many tokens.

    top1_agreement: whether student and teacher hold the same token most likely; top8_overlap: the share of the teacher's
    8 that are among the student's 8 (arXiv 2604.13016: it rises in a healthy run). The masses: what student and teacher
    give to the tokens of a top-k support. Of the tokens that the student named (`student_topk`) only the masses are
    known; of the sampled token alone, nothing is.
    """
    count, ids = len(logprobs_nV), part.support_ids
    places = torch.arange(0, count, max(1, count // COMPARED), device=logprobs_nV.device)
    places = places[part.mask[rows][places]]
    student, whole = logprobs_nV[places], places + rows.start
    sums = [torch.full((), torch.nan, device=logprobs_nV.device)] * 4
    if ids.shape[1]:
        teacher, support = part.support_logprobs[whole], ids[whole]
        sums[2], sums[3] = student.gather(-1, support).exp().sum(), teacher.exp().sum()
    elif part.hidden or part.support_logprobs.shape[1]:
        teacher = mixture_logprobs(part.hidden, whole) if part.hidden else part.support_logprobs[whole]
        support = torch.arange(teacher.shape[1], device=teacher.device).expand_as(teacher)
    else:
        return torch.stack([*sums, torch.zeros_like(sums[0])])[None]
    if not named_by_student:
        k = min(TOP, support.shape[1], student.shape[1])
        theirs = support.gather(-1, teacher.topk(k).indices)
        ours = student.topk(k).indices
        sums[0] = (theirs[:, 0] == ours[:, 0]).float().sum()
        sums[1] = (theirs[:, :, None] == ours[:, None]).any(-1).float().mean(-1).sum()
    return torch.stack([*sums, torch.full_like(sums[0], len(places))])[None]


class UpdateMetrics:
    """Collects one number a token for each metric, and keeps them on the device until the end."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._columns: dict[str, list[Tensor]] = {}
        self._agreement: list[Tensor] = []

    def add(self, loss: Tensor, part: Part, trajectories: np.ndarray, columns: Mapping[str, Tensor]) -> None:
        """Adds one micro-batch. trajectories [b]: the update's rows of its trajectories; columns, [n] each: `logprobs`,
        `entropy`, `reverse_kl`, `forward_kl_old`, `clip_fraction`; and `agreement` [chunks, 5]."""
        rows = torch.from_numpy(trajectories).to(part.rows.device)[part.rows]
        self._loss = loss.detach() + (0 if self._loss is None else self._loss)
        self._agreement.append(columns["agreement"])
        own = {
            **{name: column for name, column in columns.items() if name != "agreement"},
            "behaviour_logprobs": part.behaviour_logprobs,
            "teacher_logprobs": part.teacher_logprobs,
            "old_logprobs": part.old_logprobs,
            "mask": part.mask,
            "on_policy": part.on_policy,
            "trajectory": rows,
        }
        for name, column in own.items():
            self._columns.setdefault(name, []).append(column.detach())

    def means(self, groups: Mapping[str, np.ndarray], ranks: Ranks) -> dict[str, Any]:
        """The update's metrics, by their names in metrics.jsonl, over the tokens of all ranks. groups: prefix of a name
        -> [B] bool, which trajectories it is about."""
        assert self._loss is not None
        column = {name: ranks.concatenate(torch.cat(parts)) for name, parts in self._columns.items()}
        mask, tokens = column["mask"], int(column["mask"].sum())
        kept = {name: values[mask] for name, values in column.items()}
        log_ratios = (kept["logprobs"] - kept["teacher_logprobs"]).cpu().numpy()
        tails = np.quantile(log_ratios, [0.01, 0.99]) if tokens else [np.nan, np.nan]
        moved = kept["logprobs"] - kept["old_logprobs"]
        engine = (column["logprobs"] - column["behaviour_logprobs"])[column["on_policy"]]
        *agreed, compared = ranks.sum(torch.cat(self._agreement).double().sum(0)).tolist()
        means = ("reverse_kl", "forward_kl_old", "entropy", "clip_fraction")
        return {
            "loss": ranks.sum(self._loss).item(),
            "tokens_trained": tokens,
            **{name: _mean(kept[name]) for name in means},
            "log_ratio_p01": float(tails[0]),
            "log_ratio_p99": float(tails[1]),
            "log_ratio_histogram": log_ratio_histogram(log_ratios),
            "ratio_mean": _mean(moved.exp()),
            "ratio_max": moved.max().exp().item() if tokens else 0.0,
            "importance_ess": effective_sample_size(moved, torch.ones_like(moved, dtype=torch.bool)).item(),
            "engine_logprob_abs_diff": _mean(engine.abs(), nothing=float("nan")),
            **{name: v / compared for name, v in zip(AGREEMENT, agreed, strict=True) if compared and v == v},
            **_by_group(kept["trajectory"], kept["reverse_kl"], groups),
        }


def log_ratio_histogram(log_ratio_N: np.ndarray) -> list[int]:
    """[LOG_RATIO_BINS] tokens whose log pi - log q, in nats, is nearest to 0.5 (i - 8)."""
    last = LOG_RATIO_BINS // 2
    places = np.clip(np.rint(log_ratio_N / LOG_RATIO_BIN), -last, last).astype(np.int64) + last
    return np.bincount(places, minlength=LOG_RATIO_BINS).tolist()


def _mean(values: Tensor, nothing: float = 0.0) -> float:
    return values.double().mean().item() if len(values) else nothing


def _by_group(trajectory_N: Tensor, reverse_kl_N: Tensor, groups: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of the tokens trained on: each group's share and its reverse KL."""
    found = {}
    for name, rows_B in groups.items():
        own = torch.from_numpy(rows_B).to(trajectory_N.device)[trajectory_N]
        found[f"{name}/token_share"] = _mean(own)
        found[f"{name}/reverse_kl"] = _mean(reverse_kl_N[own], nothing=float("nan"))
    return found


def groups_of(
    ids: np.ndarray,
    scores: Sequence[TeacherScores],
    domains: Sequence[str | None] | None,
    *,
    teachers: Collection[str] = (),
    ranks: Ranks | None = None,
    device: str = "cpu",
) -> dict[str, np.ndarray]:
    """`teacher/<name>` and `domain/<name>` -> [B] bool: which of the trajectories with these ids [B, 3] the teacher has
    scored, or have a prompt of the domain. Nothing where there is one teacher; nothing without domains [B].

    scores: with several ranks, those that this rank was given; teachers then names all that there may be.
    """
    scored: dict[str, set[tuple[int, ...]]] = {name: set() for name in teachers}
    for batch in scores:
        scored.setdefault(batch.teacher, set()).update(map(tuple, batch.ids.tolist()))
    names, wanted = sorted(scored), [tuple(row) for row in ids.tolist()]
    by_teacher = np.array([[row in scored[name] for row in wanted] for name in names], bool).reshape(-1, len(ids))
    if ranks is not None and ranks.size > 1:
        by_teacher = ranks.sum(torch.from_numpy(by_teacher).int().to(device)).bool().cpu().numpy()
    groups = {f"teacher/{name}": rows for name, rows in zip(names, by_teacher, strict=True) if rows.any()}
    if len(groups) < 2:
        groups = {}
    for domain in sorted({domain for domain in domains or () if domain is not None}):
        groups[f"domain/{domain}"] = np.array([domain == other for other in domains or ()])
    return groups


def response_metrics(trajectories: Trajectories) -> dict[str, float]:
    """Of the responses as they were sampled: how long the longest is, how many ended by themselves, and repetition."""
    stopped = trajectories.finish_reasons == FINISH_REASONS.index("stop")
    return {
        "response_length_max": int(trajectories.trained_lengths.max()),
        "stopped_fraction": float(stopped.mean()),
        "repetition": repetition(trajectories.response_tokens[trajectories.trained], trajectories.trained_lengths),
        **({"reward_mean": float(trajectories.rewards.mean())} if trajectories.rewards.size else {}),
    }


def repetition(tokens_N: np.ndarray, lengths_B: np.ndarray, n: int = 4) -> float:
    """1 - distinct n-grams / n-grams, mean over the responses that have one (seq-rep-4, Welleck et al., arXiv 1908.04319).

    0 where nothing is said twice; a loop of m tokens over a length L has 1 - m / (L - n + 1). 0 without any n-gram.
    """
    row_N = np.repeat(np.arange(len(lengths_B)), lengths_B)
    starts = np.flatnonzero(row_N[: len(row_N) - n + 1] == row_N[n - 1 :]) if len(row_N) >= n else np.zeros(0, np.int64)
    if not len(starts):
        return 0.0
    keys = [tokens_N[starts + place] for place in range(n)] + [row_N[starts]]
    order = np.lexsort(keys)
    new = np.ones(len(order), bool)
    new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    distinct = np.bincount(row_N[starts][order][new], minlength=len(lengths_B))
    total = np.bincount(row_N[starts], minlength=len(lengths_B))
    return float(np.mean(1 - distinct[total > 0] / total[total > 0]))
