"""The memory of each role, item by item, from numbers of a model's configuration. Plain integers, standard library only.

`understudy check` prints it, the learner decides by it how far to shard, and benchmarks compare it with what a device
reports. Shapes: P parameters, L layers, H hidden size, V vocabulary, I width of a feed-forward layer, Q and K widths of the
queries and of the keys; t tokens of a forward pass, c tokens of a head chunk, N response tokens of an update; R ranks that
share the weights.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

HEAD, LAYERS, EMBEDDING, STEP, SEARCH = "head", "layers", "embedding", "step", "search"
"""The moments of an update at which memory is highest: the output layer, between the forward and the backward pass; the
backward pass of the layers; the gradient of the embedding, at its end; the optimiser's step; the search of a shorter step
for `trust_region.max_kl`."""
PASS = (HEAD, LAYERS, EMBEDDING)
CACHE = "cache of one sequence"
ENGINE_CHUNK = 1024
"""Tokens whose log-probs vLLM computes at a time (CHUNK_SIZE in vllm/v1/worker/gpu/sample/prompt_logprob.py)."""
ALWAYS = (*PASS, STEP, SEARCH)
StepKind = Literal["fused", "foreach", "single"]
"""How AdamW is computed: one kernel that writes in place; lists of tensors, with a temporary of every parameter; or one
parameter at a time, with two temporaries of it."""


@dataclass(frozen=True, slots=True)
class ModelNumbers:
    """What the memory of a model depends on."""

    parameters: int
    """P, all of them; a tied output layer once."""
    layers: int
    hidden: int
    vocabulary: int
    """V, rows of the output layer."""
    feed_forward: int
    """I; of a mixture of experts, the widths of the experts that compute one token, added."""
    queries: int
    """Q, heads times their size."""
    keys: int
    """K, key-value heads times their size."""
    key_heads: int
    """Key-value heads: an engine shares each by as many ranks as exceed their number."""
    tied: bool
    """Whether the output layer is the embedding."""
    inner_norms: bool = False
    """Whether queries and keys are normalised head by head, as in Qwen3."""
    copies: int = 0
    """k, experts that compute one token, each from a copy of it; 0: no experts."""
    largest: int = 0
    """Parameters of a layer's largest weight, where its experts are one tensor; 0: a third of the layer at most."""
    partial_cache: bool = False
    """Whether a layer keeps less than all keys and values: a window of them, a state, or latent ones."""

    @classmethod
    def of(cls, text: Any, parameters: int) -> "ModelNumbers":
        """From a configuration of transformers (of the text model). parameters: number of all parameters.

        What a configuration does not name counts as little: a model with a state instead of attention has no heads.
        """
        heads = getattr(text, "num_attention_heads", None) or 1
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
        copies, largest = getattr(text, "num_experts_per_tok", None) or 0, 0
        if copies:
            width = getattr(text, "moe_intermediate_size", None) or inner
            count = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or copies
            # transformers keeps the gates and the up projections of all experts as one weight.
            inner, largest = copies * width, 2 * count * width * text.hidden_size
        return cls(
            parameters,
            text.num_hidden_layers,
            text.hidden_size,
            text.vocab_size,
            inner,
            heads * size,
            key_heads * size,
            key_heads,
            bool(getattr(text, "tie_word_embeddings", False)),
            inner_norms="qwen3" in getattr(text, "model_type", ""),
            copies=copies,
            largest=largest,
            partial_cache=bool(set(getattr(text, "layer_types", None) or ()) - {"full_attention"})
            or any(getattr(text, name, None) for name in ("kv_lora_rank", "sliding_window")),
        )

    @property
    def head(self) -> int:
        """V H, parameters of the output layer."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer."""
        return (self.parameters - self.head * (1 if self.tied else 2)) // self.layers

    def cache_bytes(self, tokens: int, item: int = 2) -> int:
        """Keys and values of so many tokens, in a dtype of `item` bytes."""
        return 2 * self.layers * self.keys * item * tokens

    def saved_bytes(self, item: int) -> int:
        """Bytes for each token that one layer keeps for its backward pass, beside its input. item: of the compute dtype.

        In 16 bits, under autocast with a float32 residual stream: each norm keeps a float32 [H], the second also its
        input, and each of the five products after them a 16-bit copy of its input; attention keeps queries, keys, values
        and output; the feed-forward layer four tensors [I]. A norm of the heads keeps its float32 input and 16-bit output.
        Experts compute in float32 under autocast, too, and keep their k copies of the input and of the output.
        """
        experts = 8 * self.copies * self.hidden
        if item == 4:
            norms, attention, inner = 20 * self.hidden, 8 * (self.queries + self.keys), 16 * self.feed_forward + experts
            return norms + attention + inner + 8 * (self.queries + self.keys) * self.inner_norms
        inner = (16 if experts else 8) * self.feed_forward + experts
        norms, attention = 22 * self.hidden, 4 * (self.queries + self.keys)
        return norms + attention + inner + 6 * (self.queries + self.keys) * self.inner_norms


class Item(NamedTuple):
    """One part of a role's memory."""

    name: str
    nbytes: int
    at: tuple[str, ...] = ALWAYS
    """The moments at which it is there."""
    certain: bool = True
    """False: an upper bound, or what depends on lengths that are not known before a run."""


@dataclass(frozen=True, slots=True)
class LearnerNumbers:
    """What the memory of a learner's rank depends on, beside its model."""

    ranks: int = 1
    """R, ranks that share the weights."""
    compute_bytes: int = 2
    """Of the compute dtype: 2 or 4."""
    pass_tokens: int = 16384
    """t: `microbatch_tokens`, or the longest trajectory if that is longer; of a rank that shares rows with others, its part."""
    head_chunk_tokens: int = 1024
    checkpointing: bool = True
    offload: bool = False
    step: StepKind = "fused"
    max_kl: bool = False
    exact_region: bool = False
    """Whether pi_old is kept over the whole vocabulary (`trust_region.estimator: exact`)."""
    averages: int = 0
    """Teachers that follow the student."""
    adapter_parameters: int | None = None
    """Trained parameters beside frozen weights; None: all weights are trained."""
    teacher_heads_bytes: int = 0
    """Output layers of teachers that send hidden states."""
    update_tokens: int = 0
    """N, at most."""
    score_bytes: int = 0
    """Of the scores of one token that lie on the rank's device: support or hidden states."""

    @classmethod
    def of(cls, config: Any, *, longest: int = 0, **more: Any) -> "LearnerNumbers":
        """From a LearnerConfig. longest: tokens of the longest trajectory, which has a pass of its own. more: the rest."""
        region = config.objective.trust_region
        found: dict[str, Any] = {
            "ranks": config.replicas,
            "compute_bytes": 4 if config.compute_dtype == "float32" else 2,
            "pass_tokens": -(-max(config.microbatch_tokens, longest) // config.sequence_parallel),
            "head_chunk_tokens": config.head_chunk_tokens,
            "checkpointing": config.gradient_checkpointing,
            "offload": config.offload_optimizer,
            "max_kl": region.max_kl is not None,
            "exact_region": region.estimator == "exact",
        }
        return cls(**{**found, **more})


def learner_items(model: ModelNumbers, run: LearnerNumbers) -> list[Item]:
    """The memory of one rank on its device."""
    return [
        item for item in (*_state(model, run), *_weights_of_a_pass(model, run), *_activations(model, run)) if item[1]
    ]


def _state(model: ModelNumbers, run: LearnerNumbers) -> Iterable[Item]:
    """What is held between updates, and what the step adds."""
    trained = model.parameters if run.adapter_parameters is None else run.adapter_parameters
    own = trained // run.ranks
    largest = model.head // run.ranks if run.adapter_parameters is None else own
    if run.adapter_parameters is None:
        yield Item("float32 weights", 4 * own)
    else:
        yield Item("frozen weights", run.compute_bytes * model.parameters // run.ranks)
        yield Item("float32 weights of adapters", 4 * own)
    yield Item("gradients", 4 * own)
    if run.offload:
        yield Item("AdamW's moments, of one parameter", 8 * largest, (STEP,))
    else:
        yield Item("AdamW's moments", 8 * own)
    temporaries = {"fused": 0, "foreach": 4 * own, "single": 8 * largest}
    if run.offload and run.step == "foreach":
        temporaries["foreach"] = 4 * largest
    yield Item("temporaries of the step", temporaries[run.step], (STEP,))
    yield Item("moving averages", 4 * run.averages * model.parameters // run.ranks)
    if run.max_kl:
        yield Item("weights before the step (max_kl)", 4 * own, (STEP, SEARCH))
        yield Item("weights after the step (max_kl)", 4 * own, (SEARCH,))
    yield Item("teachers' output layers", run.teacher_heads_bytes)
    if run.exact_region:
        yield Item("output layer of pi_old", run.compute_bytes * model.head)
        states = run.compute_bytes * model.hidden * run.update_tokens // run.ranks
        yield Item("hidden states of pi_old, at most", states, certain=False)
    scores = 70 * run.update_tokens + run.score_bytes * run.update_tokens // run.ranks
    yield Item("tokens and scores of an update, at most", scores, certain=False)


def _weights_of_a_pass(model: ModelNumbers, run: LearnerNumbers) -> Iterable[Item]:
    """Copies of weights, and their gradients, that a pass makes."""
    item, head, layer = run.compute_bytes, model.head, model.layer
    search = (SEARCH,) if run.max_kl else ()
    whole = 4 if run.adapter_parameters is None else item
    gradient = 4 if run.adapter_parameters is None else 0
    cast = item if whole != item else 0
    yield Item("output layer, cast", cast * head, (HEAD, *search))
    yield Item("gradient of the output layer", gradient * head, (HEAD,))
    yield Item("gradient of the output layer, of one chunk", (item if gradient and cast else 0) * head, (HEAD,))
    if run.ranks == 1:
        # Without checkpointing the graph keeps the casts of all layers.
        yield Item("layers, cast", 0 if run.checkpointing else cast * model.layers * layer, (HEAD, LAYERS))
        yield Item("one layer, cast", cast * layer if run.checkpointing else 0, (LAYERS,))
        weight = (4 + cast) * (model.largest or layer // 3)
        yield Item("gradient of one weight, and its cast", weight if gradient else 0, (LAYERS,))
        if model.tied:
            yield Item("gradient of the tied output layer", gradient * head, (LAYERS, EMBEDDING))
        yield Item("gradient of the embedding", gradient * head, (EMBEDDING,))
        return
    yield Item("output layer, gathered", whole * head, (HEAD, *search))
    yield Item("embedding, gathered", whole * head, (LAYERS, EMBEDDING))
    yield Item("gradient of the embedding, and its copy for the sum", 2 * gradient * head, (EMBEDDING,))
    yield Item("two layers, gathered", 2 * item * layer, (HEAD, LAYERS, *search))
    yield Item("gradients of one layer, and their copy for the sum", (item + 4 if gradient else 0) * layer, (LAYERS,))


def _activations(model: ModelNumbers, run: LearnerNumbers) -> Iterable[Item]:
    t, c, hidden = run.pass_tokens, run.head_chunk_tokens, model.hidden
    layer = t * model.saved_bytes(run.compute_bytes)
    # Certain where responses of a quarter of their limit fill a pass. Shorter ones, and small updates, may not.
    fills = run.update_tokens >= 4 * t * run.ranks
    yield Item("layer inputs", 4 * t * hidden * model.layers, (HEAD, LAYERS), certain=fills)
    if run.checkpointing:
        yield Item("one layer, computed again", layer, (LAYERS,), certain=False)
    else:
        yield Item("activations of all layers", layer * model.layers, (HEAD, LAYERS), certain=False)
    gradients = t * (8 * (1 + model.copies) * hidden + 2 * run.compute_bytes * model.feed_forward)
    yield Item("gradients of one layer's activations", gradients, (LAYERS,), certain=False)
    yield Item("hidden states and their gradient", 8 * t * hidden, (HEAD,), certain=False)
    search = (SEARCH,) if run.max_kl else ()
    yield Item("log-probs of a head chunk", 12 * min(c, t) * model.vocabulary, (HEAD, *search), certain=False)


def host_items(model: ModelNumbers, run: LearnerNumbers, *, publish_bytes: int, bucket: int, delta: bool) -> list[Item]:
    """The host memory of one rank, beside the process itself. publish_bytes: of the rollout dtype. bucket: its bytes."""
    own = model.parameters // run.ranks
    trained = own if run.adapter_parameters is None else run.adapter_parameters // run.ranks
    found = [
        Item("a copy for the checkpoint that is being written", 4 * own + 8 * trained + 4 * run.averages * own),
        Item("AdamW's moments", 8 * trained if run.offload else 0),
        Item("a bucket", max(bucket, publish_bytes * model.head // run.ranks)),
        Item("the last version and the next (delta)", 2 * publish_bytes * own if delta else 0),
    ]
    return [item for item in found if item.nbytes]


def engine_items(
    model: ModelNumbers,
    *,
    dtype_bytes: int,
    tensor_parallel: int,
    context: int,
    cache_bytes: int = 2,
    adapter_bytes: int = 0,
    scored_tokens: int = 0,
) -> list[Item]:
    """What one GPU of an engine must hold; the rest of its share is cache.

    context: tokens of the longest sequence. cache_bytes: of the cache's dtype. scored_tokens: of a step whose log-probs a
    teacher sends.
    """
    cache = model.cache_bytes(context, cache_bytes) // min(tensor_parallel, model.key_heads)
    activations = dtype_bytes * scored_tokens * _pass_width(model, tensor_parallel)
    log_probs = 12 * min(scored_tokens, ENGINE_CHUNK) * model.vocabulary
    found = [
        Item("weights", dtype_bytes * model.parameters // tensor_parallel),
        Item("adapter", adapter_bytes),
        Item(CACHE, cache, certain=not model.partial_cache),
        Item("activations of one layer", activations, certain=False),
        Item("log-probs of a chunk of tokens", log_probs, certain=False),
    ]
    return [item for item in found if item.nbytes]


def _pass_width(model: ModelNumbers, tensor_parallel: int) -> int:
    """Values for each token that one layer has at a time in a pass without gradient."""
    inner = 2 * model.queries + 2 * model.keys + 3 * model.feed_forward + 2 * model.copies * model.hidden
    return 4 * model.hidden + inner // tensor_parallel


def engine_host_items(version: int, *, tensor_parallel: int, delta: bool, pinned: bool) -> list[Item]:
    """The host memory of one engine's weights, beside the object store. version: bytes of a dense weight version.

    pinned: the engine copies to a GPU from memory of its own, into which deltas are decoded at once. Workers of several
    ranks are other processes: they read a copy that all engines of the node share (actors/weights/node_staging.py).
    """
    found = [
        Item("a version, once a node for all engines", version if tensor_parallel > 1 else 0),
        Item("a version in pinned memory", version if pinned and tensor_parallel == 1 and not delta else 0),
        Item("the version that deltas are applied to, and the next", 2 * version if delta else 0),
    ]
    return [item for item in found if item.nbytes]


def teacher_items(
    model: ModelNumbers, *, dtype_bytes: int, tensor_parallel: int, pass_tokens: int, head_chunk_tokens: int
) -> list[Item]:
    """The memory of a `transformers` teacher on each of its GPUs: every one has the whole embedding and output layer."""
    whole = model.head * (1 if model.tied else 2)
    weights = whole + (model.parameters - whole) // tensor_parallel
    return [
        Item("weights", dtype_bytes * weights),
        Item(
            "activations of one layer", dtype_bytes * pass_tokens * _pass_width(model, tensor_parallel), certain=False
        ),
        Item("log-probs of a head chunk", 12 * min(head_chunk_tokens, pass_tokens) * model.vocabulary, certain=False),
    ]


def peak(items: Iterable[Item], *, certain: bool = False) -> tuple[int, list[Item]]:
    """(bytes, items) at the moment when most is held. certain: count only what is certain."""
    counted = [item for item in items if item.certain or not certain]
    at = max(ALWAYS, key=lambda moment: sum(item.nbytes for item in counted if moment in item.at))
    there = [item for item in counted if at in item.at]
    return sum(item.nbytes for item in there), there
