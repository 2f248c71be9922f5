"""Measures an update while it runs: the learner's metrics in metrics.jsonl (docs/metrics.md).

The metrics need no pass over [n, V] beyond those of training: they come from columns of one number a token, and from a
comparison of the student's and the teacher's most likely tokens at a few tokens of each chunk.
Shapes: N tokens of the update, n of a micro-batch or chunk, B trajectories, K support, V vocabulary.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.teacher_scores import TeacherScores
from actors.trajectory import FINISH_REASONS, Trajectories
from learner.collate import Part
from learner.hidden_states import mixture_logprobs
from learner.objective.policy_gradient import capped, effective_sample_size
from learner.student.sharding import Ranks

COMPARED = 64
"""The most likely tokens are compared at about this many tokens of a chunk, evenly spread: top-k costs a pass over [n, V]."""
TOP = 8
"""The overlap compares this many most likely tokens."""
LOG_RATIO_BIN, LOG_RATIO_BINS = 0.5, 17
"""The histogram of log-ratios: width of a bin in nats, and number of bins, around 0. The outermost are open."""
AGREEMENT = ("top1_agreement", "top8_overlap", "student_support_mass", "teacher_support_mass")
UNKNOWN = ("reverse_kl", "forward_kl_old", "entropy", "clip_fraction", "ratio_mean", "ratio_max", "importance_ess")
NOTHING_TRAINED = {
    "loss": 0.0,
    "tokens_trained": 0,
    "log_ratio_histogram": [0] * LOG_RATIO_BINS,
    **dict.fromkeys((*UNKNOWN, "engine_logprob_abs_diff", "mismatch_ess", "behaviour_ess", "behaviour_kl"), math.nan),
}
"""The metrics of an update without a step."""
NOT_OF_DATA = {
    "log_ratio_histogram": [0] * LOG_RATIO_BINS,
    **dict.fromkeys(("reverse_kl", "forward_kl_old", "clip_fraction", "ratio_mean", "ratio_max"), math.nan),
    **dict.fromkeys(("importance_ess", "mismatch_ess", "engine_logprob_abs_diff"), math.nan),
    **dict.fromkeys(("log_ratio_p01", "log_ratio_p99", "filter_weight_mean"), math.nan),
}
"""Metrics that compare the student with who wrote and who scored: of a data set, nobody did."""


def agreement(logprobs_nV: Tensor, part: Part, rows: slice | Tensor, *, named_by_student: bool = False) -> Tensor:
    """[1, 5] sums over some tokens of a chunk: the four of AGREEMENT (NaN if unknown), and the number of tokens.

    top1_agreement: student and teacher have the same most likely token. top8_overlap: share of the teacher's 8 most likely
    tokens that are among the student's 8 (arXiv 2604.13016: it rises in a healthy run). The masses: probability that
    student and teacher give to the tokens of a top-k support. A support that the student chose (`student_topk`) gives the
    masses only. The signal `sampled` gives none of the four.
    """
    count, ids = len(logprobs_nV), part.support_ids
    places = torch.arange(0, count, max(1, count // COMPARED), device=logprobs_nV.device)
    of_part = torch.arange(len(part.mask), device=places.device)[rows][places]  # numbers in the part
    entries = part.support_logprobs[of_part].isfinite()
    known = part.mask[of_part] & (entries.any(-1) if ids.shape[1] else entries.all(-1))
    student, of_part = logprobs_nV[places[known]], of_part[known]
    sums = [torch.full((), torch.nan, device=logprobs_nV.device)] * 4
    if ids.shape[1]:
        teacher, support = part.support_logprobs[of_part], ids[of_part]
        missing = teacher.isnan()  # entries that the teacher has no score for
        teacher = teacher.masked_fill(missing, -torch.inf)
        sums[2] = student.gather(-1, support).masked_fill(missing, -torch.inf).exp().sum()
        sums[3] = teacher.exp().sum()
    elif part.hidden or part.support_logprobs.shape[1]:
        teacher = mixture_logprobs(part.hidden, of_part) if part.hidden else part.support_logprobs[of_part]
        support = torch.arange(teacher.shape[1], device=teacher.device).expand_as(teacher)
    else:
        return torch.stack([*sums, torch.zeros_like(sums[0])])[None]
    if not named_by_student:
        k = min(TOP, support.shape[1], student.shape[1])
        teacher_ids = support.gather(-1, teacher.topk(k).indices)
        student_ids = student.topk(k).indices
        sums[0] = (teacher_ids[:, 0] == student_ids[:, 0]).float().sum()
        sums[1] = (teacher_ids[:, :, None] == student_ids[:, None]).any(-1).float().mean(-1).sum()
    return torch.stack([*sums, torch.full_like(sums[0], len(of_part))])[None]


class UpdateMetrics:
    """Collects one number a token for each metric. Stays on the device: a copy to the host would wait for the GPU."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._sizes: list[float] = []
        self._again, self._moved = False, False
        self._columns: dict[str, list[Tensor]] = {}
        self._agreement: list[Tensor] = []

    def begin_step(self, size: float, *, again: bool, moved: bool) -> None:
        """Begins an optimiser step, whose loss is a mean over `size` tokens or trajectories.

        again: its tokens were in an earlier step of this update (the second epoch). moved: an earlier step of this update
        has changed the weights.
        """
        self._sizes.append(size)
        self._again, self._moved = again, moved

    def add(self, loss: Tensor, part: Part, trajectories: np.ndarray, columns: Mapping[str, Tensor]) -> None:
        """Adds one micro-batch. trajectories [b]: the update's rows of its trajectories; columns, [n] each: `logprobs`,
        `entropy`, `reverse_kl`, `forward_kl_old`, `clip_fraction`; and `agreement` [chunks, 5]."""
        rows = torch.from_numpy(trajectories).to(part.rows.device)[part.rows]
        if len(self._losses) < len(self._sizes):
            self._losses.append(torch.zeros_like(loss, requires_grad=False))
        self._losses[-1] = self._losses[-1] + loss.detach()
        self._agreement.append(columns["agreement"])
        collected = {
            **{name: column for name, column in columns.items() if name != "agreement"},
            "behaviour_logprobs": part.behaviour_logprobs,
            "teacher_logprobs": part.teacher_logprobs,
            "old_logprobs": part.old_logprobs,
            "filter_weight": part.filter_weight,
            "mask": part.mask,
            "first": part.mask & (not self._again),
            # Tokens sampled with the very weights that this pass used: else the difference also contains training.
            "on_policy": part.on_policy & (not self._moved),
            "trajectory": rows,
        }
        for name, column in collected.items():
            self._columns.setdefault(name, []).append(column.detach())

    def means(self, groups: Mapping[str, np.ndarray], ranks: Ranks) -> dict[str, Any]:
        """The update's metrics over the tokens of all ranks, by their names in metrics.jsonl.

        Means are over all passes of all steps: means over tokens, not over micro-batches' means, which have different
        numbers of tokens. What counts tokens counts each once. groups: prefix of a name -> [B] bool, the trajectories of
        that group.
        """
        if not self._sizes:
            return NOTHING_TRAINED
        column = {name: ranks.concatenate(torch.cat(parts)) for name, parts in self._columns.items()}
        kept = {name: values[column["mask"]] for name, values in column.items()}
        log_ratios = (column["logprobs"] - column["teacher_logprobs"])[column["first"]].cpu().numpy()
        tails = np.quantile(log_ratios, [0.01, 0.99])
        moved = capped(kept["logprobs"] - kept["old_logprobs"])
        engine = (column["logprobs"] - column["behaviour_logprobs"])[column["on_policy"]]
        before = (column["logprobs"] - column["behaviour_logprobs"])[column["first"]]
        off_policy = effective_sample_size(before, torch.ones_like(before, dtype=torch.bool)).item()
        *agreed, compared = ranks.sum(torch.cat(self._agreement).double().sum(0)).tolist()
        means = ("reverse_kl", "forward_kl_old", "entropy", "clip_fraction")
        losses, sizes = ranks.sum(torch.stack(self._losses)).double().cpu(), torch.tensor(self._sizes).double()
        return {
            "loss": (losses @ sizes / sizes.sum()).item(),
            "tokens_trained": int(column["first"].sum()),
            **{name: _mean(kept[name]) for name in means},
            "filter_weight_mean": _mean(kept["filter_weight"]),
            "log_ratio_p01": float(tails[0]),
            "log_ratio_p99": float(tails[1]),
            "log_ratio_histogram": log_ratio_histogram(log_ratios),
            "ratio_mean": _mean(moved.exp()),
            "ratio_max": moved.max().exp().item(),
            "importance_ess": effective_sample_size(moved, torch.ones_like(moved, dtype=torch.bool)).item(),
            "engine_logprob_abs_diff": _mean(engine.abs()),
            "mismatch_ess": off_policy,
            "behaviour_ess": off_policy,
            "behaviour_kl": _mean(-before),
            # v == v is false for NaN: metrics that are unknown are left out.
            **{name: v / compared for name, v in zip(AGREEMENT, agreed, strict=True) if compared and v == v},
            **_by_group(kept["trajectory"], kept["reverse_kl"], groups),
        }

    def reverse_kl_of_each(self, count: int, ranks: Ranks) -> list[float]:
        """[B] mean over the tokens of each of the `count` trajectories, in their first pass; NaN without such tokens."""
        if not self._sizes:
            return [math.nan] * count
        first, rows, values = (
            ranks.concatenate(torch.cat(self._columns[name])).cpu() for name in ("first", "trajectory", "reverse_kl")
        )
        own = rows[first]
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, own, values[first].double())
        return (sums / torch.bincount(own, minlength=count)).tolist()


def log_ratio_histogram(log_ratio_N: np.ndarray) -> list[int]:
    """[LOG_RATIO_BINS] counts: entry i counts the tokens whose log pi - log q, in nats, is nearest to 0.5 (i - 8)."""
    last = LOG_RATIO_BINS // 2
    places = np.clip(np.rint(log_ratio_N / LOG_RATIO_BIN), -last, last).astype(np.int64) + last
    return np.bincount(places, minlength=LOG_RATIO_BINS).tolist()


def _mean(values: Tensor) -> float:
    """NaN without values."""
    # In float64: sums of float32 over millions of tokens would lose digits.
    return values.double().mean().item()


def _by_group(trajectory_N: Tensor, reverse_kl_N: Tensor, groups: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Each group's share of the tokens that were trained on, and its reverse KL."""
    found = {}
    for name, rows_B in groups.items():
        in_group = torch.from_numpy(rows_B).to(trajectory_N.device)[trajectory_N]
        found[f"{name}/token_share"] = _mean(in_group)
        found[f"{name}/reverse_kl"] = _mean(reverse_kl_N[in_group])
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
    """`teacher/<name>` or `domain/<name>` -> [B] bool: which of the trajectories the teacher has scored, or have the domain.

    A single teacher makes no group. ids: [B, 3]. domains: [B], or None for no groups of domains. scores: those on this
    rank. teachers: the names of all teachers, which a rank needs if there are several ranks.
    """
    scored: dict[str, set[tuple[int, ...]]] = {name: set() for name in teachers}
    for batch in scores:
        scored.setdefault(batch.teacher, set()).update(map(tuple, batch.ids.tolist()))
    names, wanted = sorted(scored), [tuple(row) for row in ids.tolist()]
    by_teacher = np.array([[row in scored[name] for row in wanted] for name in names], bool).reshape(-1, len(ids))
    if ranks is not None and ranks.size > 1:  # each rank has the scores of its own trajectories only
        by_teacher = ranks.sum(torch.from_numpy(by_teacher).int().to(device)).bool().cpu().numpy()
    groups = {f"teacher/{name}": rows for name, rows in zip(names, by_teacher, strict=True) if rows.any()}
    if len(groups) < 2:  # the one teacher's metrics are those of the update
        groups = {}
    for domain in sorted({domain for domain in domains or () if domain is not None}):
        groups[f"domain/{domain}"] = np.array([domain == other for other in domains or ()])
    return groups


def response_metrics(trajectories: Trajectories) -> dict[str, float]:
    """Measures the responses as they were sampled: longest length, share that ended by a stop token, repetition, reward;
    and, where others wrote a part of them, turns and the others' share."""
    stopped = trajectories.finish_reasons == FINISH_REASONS.index("stop")
    own = trajectories.trained
    turns = {"turns_mean": float(trajectories.turn_counts.mean()), "context_share": float(1 - own.mean())}
    return {
        "response_length_max": int(trajectories.trained_lengths.max()),
        "stopped_fraction": float(stopped.mean()),
        "repetition": repetition(trajectories.response_tokens[own], trajectories.trained_lengths),
        **({} if own.all() else turns),
        **({"reward_mean": float(trajectories.rewards.mean())} if trajectories.rewards.size else {}),
    }


def repetition(tokens_N: np.ndarray, lengths_B: np.ndarray, n: int = 4) -> float:
    """1 - distinct n-grams / n-grams, mean over the responses that have one (seq-rep-4, Welleck et al., arXiv 1908.04319).

    0 if no n-gram occurs twice, or there is none; a loop of m tokens over a length L has 1 - m / (L - n + 1).
    """
    row_N = np.repeat(np.arange(len(lengths_B)), lengths_B)
    starts = np.flatnonzero(row_N[: len(row_N) - n + 1] == row_N[n - 1 :]) if len(row_N) >= n else np.zeros(0, np.int64)
    if not len(starts):
        return 0.0
    # After sorting by response and n-gram, equal n-grams are neighbours, and each first one counts as distinct.
    keys = [tokens_N[starts + place] for place in range(n)] + [row_N[starts]]
    order = np.lexsort(keys)
    new = np.ones(len(order), bool)
    new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    distinct = np.bincount(row_N[starts][order][new], minlength=len(lengths_B))
    total = np.bincount(row_N[starts], minlength=len(lengths_B))
    return float(np.mean(1 - distinct[total > 0] / total[total > 0]))
