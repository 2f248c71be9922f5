"""What a real vLLM engine samples and records: seeds, stops, filters, errors, and calls that overlap."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.config import RolloutConfig, SamplingConfig
from actors.errors import CampaignError, UserError
from actors.rollout.vllm_engine import VllmEngine
from actors.teacher.local import LocalTeacher
from actors.trajectory import FINISH_REASONS, Requests, Trajectories, offsets_of
from benchmarks.memory import allocated_bytes
from tests.tiny_engine import OPTIONS, Brake, ask, difference, publish
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, received, teacher_config

pytestmark = pytest.mark.integration
STOPS = [1, *range(6, 20)]
SAMPLING = SamplingConfig(max_response_tokens=8, stop_token_ids=STOPS[1:])
FILTERED = SamplingConfig(temperature=0.7, top_p=0.9, top_k=12, max_response_tokens=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = make_tiny_model(tmp_path_factory.mktemp("model") / "m")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def make(model: Any, sampling: SamplingConfig, support_size: int = 0, **options: Any) -> VllmEngine:
    config = RolloutConfig(dtype="float32", engine=OPTIONS | options)
    return VllmEngine(model.config._name_or_path, config, sampling, stop_token_ids=[1], support_size=support_size)


@pytest.fixture(scope="module")
def engine(model: Any) -> Iterator[VllmEngine]:
    engine = make(model, SAMPLING, support_size=30)
    engine.load_weights(*publish(model, 0)).result(timeout=600)
    yield engine
    engine.close()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(20, 90, rng.integers(3, 12)).tolist() for _ in range(count)]


def responses(written: Trajectories) -> list[list[int]]:
    return [part.tolist() for part in np.split(written.response_tokens, written.response_offsets[1:-1])]


def test_a_response_ends_with_its_stop_token_or_at_the_limit(engine: VllmEngine) -> None:
    written = engine.generate(ask(prompts(40)), SAMPLING).result(timeout=600)
    found = [FINISH_REASONS[reason] for reason in written.finish_reasons]
    assert set(found) == {"stop", "length"}
    for response, reason in zip(responses(written), found, strict=True):
        assert not set(response[:-1]) & set(STOPS)
        assert (response[-1] in STOPS) == (reason == "stop")
        assert len(response) == 8 or reason == "stop"


def test_more_prompts_than_one_step_reads_change_no_sample(model: Any, engine: VllmEngine) -> None:
    texts = [text * 6 for text in prompts(24)]
    few = make(model, SAMPLING, support_size=30, max_num_batched_tokens=256)
    few.load_weights(*publish(model, 0)).result(timeout=600)
    found, expected = (e.generate(ask(texts), SAMPLING).result(timeout=600) for e in (few, engine))
    few.close()
    assert sum(map(len, texts)) > 3 * 256
    assert responses(found) == responses(expected)


def test_the_order_of_requests_changes_no_sample(engine: VllmEngine) -> None:
    texts = prompts(12)
    order = np.random.default_rng(1).permutation(12)
    straight = ask(texts)
    shuffled = Requests(
        ids=straight.ids[order],
        seeds=straight.seeds[order],
        prompt_tokens=np.concatenate([texts[i] for i in order]).astype(np.int32),
        prompt_offsets=offsets_of(len(texts[i]) for i in order),
    )
    first = engine.generate(straight, SAMPLING).result(timeout=600)
    second = engine.generate(shuffled, SAMPLING).result(timeout=600)
    np.testing.assert_array_equal(second.ids, straight.ids[order])
    assert responses(second) == [responses(first)[i] for i in order]


def test_samples_of_one_prompt_differ_by_their_seeds(engine: VllmEngine) -> None:
    written = engine.generate(ask([prompts(1)[0]] * 8), SAMPLING).result(timeout=600)
    assert len({tuple(response) for response in responses(written)}) > 4


def test_greedy_answers_are_those_of_a_plain_forward_pass(engine: VllmEngine, model: Any) -> None:
    texts = prompts(6)
    written = engine.generate(ask(texts), SAMPLING, greedy=True).result(timeout=600)
    for prompt, response in zip(texts, responses(written), strict=True):
        text = list(prompt)
        while len(text) < len(prompt) + 8 and (len(text) == len(prompt) or text[-1] not in STOPS):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        assert response == text[len(prompt) :]
    assert difference(model, written) < 2e-5


def test_calls_that_overlap_get_their_own_answers(engine: VllmEngine) -> None:
    alone = [engine.generate(ask(prompts(5, i), seed=i), SAMPLING).result(timeout=600) for i in range(4)]
    together = [engine.generate(ask(prompts(5, i), seed=i), SAMPLING) for i in range(4)]
    for expected, future in zip(alone, together, strict=True):
        assert responses(future.result(timeout=600)) == responses(expected)


def test_a_prompt_that_does_not_fit_fails_its_own_call_only(engine: VllmEngine) -> None:
    other = engine.generate(ask(prompts(5)), SAMPLING)
    with pytest.raises(Exception, match=r"length 300\) is longer"):
        engine.generate(ask([*prompts(2), [20] * 300, *prompts(2)]), SAMPLING).result(timeout=600)
    again = engine.generate(ask(prompts(5)), SAMPLING).result(timeout=600)
    assert responses(again) == responses(other.result(timeout=600))


def test_what_is_aborted_ends_in_an_error_and_the_engine_works_on(engine: VllmEngine, model: Any) -> None:
    before = engine.tokens_sampled
    brake = Brake(engine, steps=3)
    call = engine.generate(ask(prompts(40)), SAMPLING)
    brake.wait()
    engine.abort().result(timeout=600)
    brake.release()
    with pytest.raises(CampaignError, match="aborted"):
        call.result(timeout=600)
    written = engine.generate(ask(prompts(3)), SAMPLING).result(timeout=600)
    assert difference(model, written) < 2e-5
    assert engine.tokens_sampled - before >= len(written.response_tokens)


def test_the_most_likely_tokens_are_named_at_each_position(engine: VllmEngine, model: Any) -> None:
    written = engine.generate(ask(prompts(12)), SAMPLING).result(timeout=600)
    assert written.support_ids.shape == (len(written.response_tokens), 30)
    assert difference(model, written) < 2e-5  # the sampled token's log-prob is not one of theirs
    for i, response in enumerate(responses(written)):
        prompt = written.prompt_tokens[slice(*written.prompt_offsets[i : i + 2])].tolist()
        with torch.no_grad():
            expected = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].topk(30).indices
        found = written.support_ids[slice(*written.response_offsets[i : i + 2])]
        for named, likely in zip(found.tolist(), expected.tolist(), strict=True):
            assert len(set(named) & set(likely)) >= 29  # the last two may be equal to rounding
            assert named[0] == likely[0]


def processed(logits_V: torch.Tensor) -> torch.Tensor:
    """Log-probs after temperature, top-k and nucleus, token by token as the definitions say."""
    probabilities = torch.softmax(logits_V.double() / FILTERED.temperature, -1)
    kept: list[int] = []
    for token in probabilities.argsort(descending=True)[: FILTERED.top_k].tolist():
        total = probabilities[probabilities.argsort(descending=True)[: FILTERED.top_k]].sum()
        if probabilities[kept].sum() / total >= FILTERED.top_p:
            break
        kept.append(token)
    out = torch.full_like(probabilities, -torch.inf)
    out[kept] = (probabilities[kept] / probabilities[kept].sum()).log()
    return out


def test_recorded_logprobs_are_those_of_the_filtered_distribution_that_was_sampled(model: Any) -> None:
    engine = make(model, FILTERED, support_size=20)  # more tokens than the filters leave
    try:
        engine.load_weights(*publish(model, 0)).result(timeout=600)
        written = engine.generate(ask(prompts(16)), FILTERED).result(timeout=600)
        for i, response in enumerate(responses(written)):
            prompt = written.prompt_tokens[slice(*written.prompt_offsets[i : i + 2])].tolist()
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            expected = [processed(row)[token].item() for row, token in zip(logits, response, strict=True)]
            recorded = written.behaviour_logprobs[slice(*written.response_offsets[i : i + 2])]
            np.testing.assert_allclose(recorded, expected, atol=2e-5)
            # And before the filters, over the whole vocabulary: pi_old of the objective.
            before = torch.log_softmax(logits / FILTERED.temperature, -1)
            expected = before.gather(1, torch.tensor(response)[:, None])[:, 0].tolist()
            recorded = written.policy_logprobs[slice(*written.response_offsets[i : i + 2])]
            np.testing.assert_allclose(recorded, expected, atol=2e-5)
            named = written.support_ids[slice(*written.response_offsets[i : i + 2])]
            assert (named[:, :2] == before.topk(2).indices.numpy()).all()

        # And they are sampled as often as that says: a chi-square statistic of `kinds - 1` degrees of freedom.
        prompt, count = prompts(1)[0], 1000
        one = SamplingConfig(**vars(FILTERED) | {"max_response_tokens": 1})
        drawn = engine.generate(ask([prompt] * count), one).result(timeout=600).response_tokens
        with torch.no_grad():
            expected_counts = count * processed(model(torch.tensor([prompt])).logits[0, -1]).exp().numpy()
        seen = np.bincount(drawn, minlength=len(expected_counts))
        possible = expected_counts > 0
        assert possible.sum() >= 4 and not seen[~possible].any()
        statistic = ((seen - expected_counts)[possible] ** 2 / expected_counts[possible]).sum()
        assert statistic < 3 * possible.sum() + 10
    finally:
        engine.close()


def test_greedy_answers_have_the_log_probs_of_the_tempered_policy(model: Any) -> None:
    engine = make(model, FILTERED)
    try:
        engine.load_weights(*publish(model, 0)).result(timeout=600)
        written = engine.generate(ask(prompts(4)), FILTERED, greedy=True).result(timeout=600)
        plain = engine.generate(ask(prompts(4)), FILTERED, greedy=True).result(timeout=600)
        for i, response in enumerate(responses(written)):
            prompt = written.prompt_tokens[slice(*written.prompt_offsets[i : i + 2])].tolist()
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == response
            expected = torch.log_softmax(logits / FILTERED.temperature, -1).max(-1).values
            span = slice(*written.response_offsets[i : i + 2])
            np.testing.assert_allclose(plain.policy_logprobs[span], expected, atol=2e-5)
    finally:
        engine.close()


@pytest.mark.parametrize("filters", [{"top_p": 0.7}, {"top_k": 5}, {"top_p": 0.8, "top_k": 20}])
def test_the_first_update_on_filtered_samples_is_on_policy(filters: dict[str, Any], tmp_path: Path) -> None:
    """With a generation_config.json whose sampler settings must not be used."""
    models = {name: make_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(("student", "other"))}
    strange = {"repetition_penalty": 1.7, "temperature": 0.2, "top_k": 2, "do_sample": True, "min_p": 0.3}
    (models["student"] / "generation_config.json").write_text(json.dumps(strange))
    sampling = SamplingConfig(temperature=0.6, max_response_tokens=12, **filters)
    learner = make_learner(models, temperature=0.6)
    config = RolloutConfig(dtype="float32", engine=OPTIONS)
    engine = VllmEngine(str(models["student"]), config, sampling, stop_token_ids=[1])
    try:
        *buckets, manifest = received(learner.publish())
        engine.load_weights(manifest, buckets).result(timeout=600)
        written = engine.generate(ask(prompts(12)), sampling).result(timeout=600)
    finally:
        engine.close()
    teacher = LocalTeacher(teacher_config(models, "other", "sampled", temperature=0.6))
    metrics = learner.update(written.ids, written, teacher.score(written.ids, written)[1])
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-4) and metrics["clip_fraction"] == 0
    assert abs(metrics["forward_kl_old"]) < 1e-6 and metrics["engine_logprob_abs_diff"] < 1e-4
    assert 0.2 < metrics["filter_weight_mean"] < 0.999
    kept = np.exp(written.policy_logprobs - written.behaviour_logprobs)
    assert metrics["filter_weight_mean"] == pytest.approx(kept.mean(), rel=1e-4)
    if "top_p" in filters and "top_k" not in filters:
        assert kept.min() > 0.7 - 1e-4  # a nucleus holds at least this much


def test_ids_beyond_the_tokenizer_are_never_sampled(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m", vocab_extra=400)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens, sampling = model.config.vocab_size - 400, SamplingConfig(temperature=1.5, max_response_tokens=16)
    config = RolloutConfig(dtype="float32", engine=OPTIONS)
    engine = VllmEngine(str(path), config, sampling, stop_token_ids=[1], vocabulary=tokens)
    try:
        engine.load_weights(*publish(model, 0)).result(timeout=600)
        written = engine.generate(ask(prompts(32)), sampling).result(timeout=600)
        assert len(written.response_tokens) > 100 and written.response_tokens.max() < tokens
        for i, response in enumerate(responses(written)):
            prompt = written.prompt_tokens[slice(*written.prompt_offsets[i : i + 2])].tolist()
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :tokens]
            expected = torch.log_softmax(logits / 1.5, -1).gather(1, torch.tensor(response)[:, None])[:, 0]
            span = slice(*written.response_offsets[i : i + 2])
            np.testing.assert_allclose(written.behaviour_logprobs[span], expected, atol=2e-5)
    finally:
        engine.close()


def test_an_unknown_engine_option_names_its_key(model: Any) -> None:
    with pytest.raises(UserError, match=r"rollout\.engine: found .*no_such_option"):
        make(model, SAMPLING, no_such_option=1)


def test_the_memory_of_kernels_on_a_cpu_levels_off(engine: VllmEngine) -> None:
    from vllm import _custom_ops

    product = _custom_ops.create_onednn_mm(torch.zeros(16, 16), 32)
    held = {0: allocated_bytes()}
    for rows in range(1, 1601):  # oneDNN compiles a kernel for each, and keeps 1,024 in the process
        _custom_ops.onednn_mm(product, torch.zeros(rows, 16), None)
        held[rows] = allocated_bytes()
    assert held[1000] - held[500] > 5e6  # without this the next line would show nothing
    assert held[1600] - held[1100] < 0.05 * (held[1000] - held[500])


def test_a_small_cache_gives_fewer_seats_and_its_preemptions_are_counted(model: Any, engine: VllmEngine) -> None:
    """Twelve blocks of 32 tokens hold six sequences of 48 tokens at their end, and all sixteen at their beginning."""
    long = SamplingConfig(max_response_tokens=40)
    texts = [[20 + i] * 8 for i in range(16)]
    small = make(model, long, block_size=32, num_gpu_blocks_override=12, max_num_batched_tokens=2048)
    small.load_weights(*publish(model, 0)).result(timeout=600)
    large = make(model, long, block_size=32)
    large.load_weights(*publish(model, 0)).result(timeout=600)
    assert large.seats == 16 and small.seats == int(12 * 32 / (40 * 9 / 8))
    brake = Brake(small, until=lambda: small.preempted)
    running = small.generate(ask(texts), long)
    brake.wait()
    before = small.preempted
    small.load_weights(*publish(model, 1)).result(timeout=600)  # which makes all running ones start again, and is none
    assert small.preempted == before and not running.done()
    brake.release()
    running.result(timeout=600)
    before = small.preempted
    assert small.seats < 8 and large.preempted == 0
    written = small.generate(ask(texts), long).result(timeout=600)
    assert small.preempted > before
    expected = large.generate(ask(texts), long).result(timeout=600)
    assert responses(written) == responses(expected)
    assert large.preempted == 0 and large.seats == 16
    small.close()
    large.close()
