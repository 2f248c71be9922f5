"""The learner: masks, order, precision, publishing, saving and failing."""

import pickle
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.errors import NonFiniteLossError
from actors.teacher_scores import select_scores
from actors.trajectory import offsets_of, select_trajectories
from actors.weights.buckets import WeightVersion, unpack
from learner.config import ObjectiveConfig, OptimizerConfig
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, received, sampled, weights_of


def test_an_update_does_not_depend_on_how_its_trajectories_travelled(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    one, many = make_learner(models), make_learner(models)
    one.update(written.ids, written, scores)
    parts = [written.ids[[4, 1]], written.ids[[5, 0, 3, 2]]]
    shuffled = [*(select_scores(p, [scores]) for p in parts), *(select_trajectories(p, [written]) for p in parts)]
    many.update(written.ids, *shuffled)
    assert torch.equal(weights_of(one), weights_of(many))


@pytest.mark.filterwarnings("error")
def test_arrays_that_cannot_be_written_to_are_trained_on_as_others_are(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other", "full")
    written = replace(written, rewards=np.arange(len(written), dtype=np.float32))
    objective = ObjectiveConfig(estimator="full", reward_weight=0.5)
    one, other = (make_learner(models, objective=objective) for _ in range(2))
    one.update(written.ids, written, scores)
    for batch in (written, scores):  # as they come out of Ray's object store
        for field in fields(batch):
            if isinstance(array := getattr(batch, field.name), np.ndarray):
                array.flags.writeable = False
    before = pickle.dumps((written, scores), protocol=5)
    other.update(written.ids, written, scores)
    assert torch.equal(weights_of(one), weights_of(other))
    assert pickle.dumps((written, scores), protocol=5) == before


def test_missing_scores_leave_numerator_and_denominator(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other", "sampled")
    missing = scores.logprobs.copy()
    missing[scores.response_offsets[5] :] = np.nan  # all of the last trajectory
    masked, fewer = make_learner(models), make_learner(models)
    metrics = masked.update(written.ids, written, replace(scores, logprobs=missing))
    fewer.update(written.ids[:5], written, scores)
    torch.testing.assert_close(weights_of(masked), weights_of(fewer), rtol=0, atol=1e-6)
    assert metrics["tokens_trained"] == scores.response_offsets[5]


def test_masked_tokens_are_not_trained_on(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    token = int(written.response_tokens[0])
    objective = ObjectiveConfig(masked_token_ids=[token])
    metrics = make_learner(models, objective=objective).update(written.ids, written, scores)
    assert metrics["tokens_trained"] == (written.response_tokens != token).sum()


def test_a_saved_learner_goes_on_to_the_same_bits(models: dict[str, Path], tmp_path: Path) -> None:
    written, scores = sampled(models, "other")
    learner = make_learner(models)
    learner.update(written.ids, written, scores)
    learner.save(str(tmp_path / "saved"))
    while not learner.saved():
        time.sleep(0.001)
    restored = make_learner(models, checkpoint=tmp_path / "saved")
    assert restored.policy_version == 1
    first, second = (one.update(written.ids, written, scores) for one in (learner, restored))
    assert torch.equal(weights_of(learner), weights_of(restored))
    assert {"busy_seconds", "processor_seconds", "engine_logprob_abs_diff"} == {
        name for name in first if first[name] != second[name]
    }
    assert np.isnan(second["engine_logprob_abs_diff"])  # no token is of the version that is trained
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")  # a model directory like any other


def test_what_is_published_loads_into_a_fresh_model(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    learner = make_learner(models)
    learner.update(written.ids, written, scores)
    *buckets, manifest = received(learner.publish())
    assert isinstance(manifest, WeightVersion) and manifest.version == 1
    fresh = AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.float32)
    state = dict(unpack(manifest, buckets))  # type: ignore[arg-type]
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied to the embedding
    assert dict(fresh.named_parameters()).keys() == state.keys()


def test_a_loss_that_is_no_number_names_update_and_trajectory_and_changes_nothing(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    learner = make_learner(models, microbatch_tokens=1)
    before = weights_of(learner)
    logprobs = written.behaviour_logprobs.copy()
    logprobs[written.response_offsets[3]] = np.nan
    with pytest.raises(NonFiniteLossError, match=r"update 1: the loss is nan \(trajectories 0/1/1\)"):
        learner.update(written.ids, replace(written, behaviour_logprobs=logprobs), scores)
    assert torch.equal(weights_of(learner), before)
    assert learner.policy_version == 0
    learner.update(written.ids, written, scores)  # and it can go on


def test_bfloat16_computes_with_float32_masters(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    half = make_learner(models, compute_dtype="bfloat16", objective=ObjectiveConfig(estimator="full"))
    whole = make_learner(models, objective=ObjectiveConfig(estimator="full"))
    a, b = (learner.update(written.ids, written, scores) for learner in (half, whole))
    assert a["loss"] == pytest.approx(b["loss"], rel=0.05) and a["loss"] != b["loss"]
    assert all(p.dtype == torch.float32 for p in half._model.parameters())


def test_gradient_checkpointing_changes_memory_not_gradients(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    plain, recomputed = make_learner(models), make_learner(models, gradient_checkpointing=True)
    norms = [learner.update(written.ids, written, scores)["grad_norm"] for learner in (plain, recomputed)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_the_full_divergence_falls_on_the_contexts_it_was_lowered_on(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    learner = make_learner(models, objective=ObjectiveConfig(estimator="full"))
    values = [learner.update(written.ids, written, scores)["reverse_kl"] for _ in range(5)]
    assert values == sorted(values, reverse=True)


def test_an_update_of_no_scored_token_is_harmless(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other", "sampled")
    learner = make_learner(models)
    nothing = replace(scores, logprobs=np.full_like(scores.logprobs, np.nan))
    metrics = learner.update(written.ids, written, nothing)
    assert metrics["tokens_trained"] == 0 and metrics["loss"] == 0 and metrics["grad_norm"] == 0


# Steps are compared where AdamW divides by something larger than rounding.
STEADY = OptimizerConfig(
    learning_rate=1e-3, warmup_updates=1, schedule="linear", final_fraction=0.1, weight_decay=0.1, epsilon=1e-3
)


@pytest.mark.parametrize("estimator", ["immediate", "full"])
def test_updates_are_those_of_a_plain_loop(estimator: str, models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    objective = ObjectiveConfig(estimator=estimator)  # type: ignore[arg-type]
    learner = make_learner(models, objective=objective, optimizer=STEADY, microbatch_tokens=30, head_chunk_tokens=4)
    plain = AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.float32).eval()
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    others = [p for p in plain.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-3)
    before = weights_of(learner)
    for rate in (0.5e-3, 0.9e-3, 0.8e-3):  # of ten updates: half a warm-up, then a ninth of the way down each
        metrics = learner.update(written.ids, written, scores)
        losses = []
        for i in range(len(written)):
            span = slice(*written.response_offsets[i : i + 2])
            prompt = written.prompt_tokens[slice(*written.prompt_offsets[i : i + 2])]
            text = torch.from_numpy(np.concatenate([prompt, written.response_tokens[span]]).astype(np.int64))
            student = torch.log_softmax(plain(text[None]).logits[0, len(prompt) - 1 : -1], -1)
            teacher = torch.from_numpy(scores.support_logprobs[span])
            if estimator == "full":
                losses.append((student.exp() * (student - teacher)).sum(-1))
                continue
            chosen = student.gather(-1, text[len(prompt) :, None])[:, 0]
            advantage = (chosen - torch.from_numpy(scores.logprobs[span])).detach()
            ratio = (chosen - torch.from_numpy(written.behaviour_logprobs[span])).exp()
            losses.append(torch.maximum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
        optimizer.zero_grad()
        loss = torch.cat(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert metrics["learning_rate"] == pytest.approx(rate)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    after = weights_of(learner)
    expected = [p.detach().reshape(-1) for _, p in plain.named_parameters()]
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, torch.cat(expected), rtol=0, atol=1e-6)


def test_the_weights_do_not_depend_on_the_micro_batches(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    found = []
    for microbatch_tokens in (1, 25, 10_000):
        learner = make_learner(models, optimizer=STEADY, microbatch_tokens=microbatch_tokens)
        for _ in range(2):
            learner.update(written.ids, written, scores)
        found.append(weights_of(learner))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)


def test_tokens_without_a_score_at_the_ends_are_as_if_they_had_not_been_written(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other", "sampled")
    lengths = written.lengths
    kept = np.concatenate([np.arange(n) < n - 2 for n in lengths])
    masked, shorter = make_learner(models, optimizer=STEADY), make_learner(models, optimizer=STEADY)
    masked.update(
        written.ids, written, replace(scores, logprobs=np.where(kept, scores.logprobs, np.nan).astype(np.float32))
    )
    names = ("response_tokens", "behaviour_logprobs", "policy_versions", "trained")
    cut = {name: getattr(written, name)[kept] for name in names}
    support = {name: getattr(scores, name)[kept] for name in ("logprobs", "support_ids", "support_logprobs")}
    offsets = offsets_of(lengths - 2)
    shorter.update(
        written.ids,
        replace(written, response_offsets=offsets, **cut),
        replace(scores, response_offsets=offsets, **support),
    )
    torch.testing.assert_close(weights_of(masked), weights_of(shorter), rtol=0, atol=1e-6)


def test_a_weight_that_is_no_number_names_the_trajectory_that_meets_it(models: dict[str, Path], tmp_path: Path) -> None:
    written, scores = sampled(models, "other")
    parts = np.split(written.response_tokens, written.response_offsets[1:-1])
    texts = [
        {*written.prompt_tokens[slice(*written.prompt_offsets[i : i + 2])].tolist(), *part.tolist()}
        for i, part in enumerate(parts)
    ]
    token, place = next((t, i) for i, text in enumerate(texts) for t in text if sum(t in other for other in texts) == 1)
    untied = make_tiny_model(tmp_path / "m", hidden=32, layers=1, tie=False)
    learner = make_learner({**models, "student": untied}, microbatch_tokens=1)
    with torch.no_grad():  # after it is loaded, since a file with NaN is refused
        learner._model.get_input_embeddings().weight[token] = np.nan
    before = weights_of(learner)
    name = "/".join(map(str, written.ids[place]))
    with pytest.raises(NonFiniteLossError, match=rf"update 1: the loss is nan \(trajectories {name}\)"):
        learner.update(written.ids, written, scores)
    assert torch.equal(weights_of(learner).view(torch.int32), before.view(torch.int32))
