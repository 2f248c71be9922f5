"""Configuration of the roles that run models without changing them. Standard library only.

`number(...)` attaches the allowed range to a field; `cluster/config.py` checks it where the full key is known.
`"???"` marks a value that has no default and must be given.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16", "float16"]


def number(
    default: Any, *, minimum: float | None = None, above: float | None = None, maximum: float | None = None
) -> Any:
    """A dataclass field with a range: minimum <= value <= maximum, value > above."""
    return field(default=default, metadata={"minimum": minimum, "above": above, "maximum": maximum})


@dataclass
class LoraConfig:
    """Adapters of low rank that are trained in place of the weights (LoRA): less memory, and a smaller checkpoint.

    Needs the library peft: `pip install peft accelerate`.
    """

    rank: int = number(16, minimum=1)
    """Rows of the thin matrices: what an update may change of a layer."""
    alpha: float = number(32.0, above=0)
    """The adapter's output is multiplied by alpha / rank."""
    target_modules: list[str] = field(default_factory=list)
    """Ends of the names of the layers that have one, for example `q_proj`. Empty: every linear layer but the output."""
    rank_stabilised: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Train the length of each row of a weight by itself, beside the adapter that turns it (DoRA, arXiv 2402.09353)."""
    publish: Literal["merged", "adapter"] = "merged"
    """What engines are given: the weights with the adapter added to them, with which they sample at full speed; or the
    adapter alone, which is small, and is computed beside the model's own weights (vLLM's LoRA)."""


@dataclass
class StudentConfig:
    """The policy that is trained."""

    model: str = "???"
    """Hugging Face model directory or hub name: config, safetensors, tokenizer with a chat template."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you have read."""
    lora: LoraConfig | None = None
    """Adapters to train. Null: all weights are trained."""


def publishes_adapter(student: StudentConfig) -> bool:
    """Whether a weight version is an adapter, and not a model."""
    return student.lora is not None and student.lora.publish == "adapter"


@dataclass
class PromptsConfig:
    """Where prompts come from and how they are turned into tokens."""

    path: str = "???"
    """A .jsonl or .parquet file, or the name of a Hugging Face dataset, with its subset after a colon: `openai/gsm8k:main`."""
    split: str = "train"
    """Split to read when `path` is a Hugging Face dataset."""
    prompt_field: str = "prompt"
    """Field with the prompt: a string, or a list of chat messages with `role` and `content`."""
    reference_field: str | None = "answer"
    """Field with the reference answer that verifiers read; null when there is none."""
    domain_field: str | None = None
    """Field with the prompt's domain, by which teachers are chosen (`teachers.<name>.domains`)."""
    chat: bool = True
    """Render with the tokenizer's chat template (a plain string becomes one user message). False: the text as it is."""
    chat_template_arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, for example `enable_thinking: false`."""
    limit: int | None = number(None, minimum=1)
    """Read at most this many records, from the start of the file."""
    shuffle: bool = True
    """Visit the prompts in a new order each epoch, decided by the campaign's seed."""


@dataclass
class VerifierConfig:
    """How a response is judged right or wrong."""

    name: str = "exact"
    """`exact`, `regex`, `numeric`, `math` (needs math-verify), or `package.module:function` of your own."""
    pattern: str | None = None
    """A regular expression: what it captures (group 1, or all) in the response is what is compared. Needed by `regex`."""


@dataclass
class SamplingConfig:
    """The distribution that trajectories are sampled from."""

    temperature: float = number(1.0, above=0)
    """Divides the student's logits, while sampling and in the objective alike."""
    top_p: float = number(1.0, above=0, maximum=1)
    """Nucleus: keep the smallest set of tokens with this probability. 1 keeps all."""
    top_k: int = number(0, minimum=0)
    """Keep the k most likely tokens. 0 keeps all."""
    max_response_tokens: int = number(1024, minimum=1)
    """A response is cut here, and recorded as truncated."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Further tokens that end a response, beside those of the tokenizer and of generation_config.json."""


@dataclass
class RolloutConfig:
    """Rollout actors: inference engines that sample trajectories."""

    backend: str = "vllm"
    """The engine: `vllm`, or `package.module:Class` of your own (docs/extending.md)."""
    replicas: int = number(1, minimum=1)
    """How many rollout actors."""
    gpus_per_replica: float | None = number(None, minimum=0)
    """GPUs of one actor. Null: one for each tensor-parallel rank, or a share where the cluster has a single GPU."""
    cpus_per_replica: float = number(1.0, minimum=0)
    """CPU cores that Ray reserves for one actor."""
    resources: dict[str, float] = field(default_factory=dict)
    """Further resources of Ray that one actor takes, by which roles are kept to the nodes meant for them: nodes started
    with `ray start --resources='{"big_memory": 8}'` take eight actors of `resources: {big_memory: 1}`."""
    tensor_parallel_size: int = number(1, minimum=1)
    """GPUs that one engine spreads its weights over."""
    dtype: Dtype = "bfloat16"
    """Data type of the engine's weights, and so of a published weight version."""
    on_new_weights: Literal["continue", "wait"] = "continue"
    """What becomes of responses that are being written when new weights come: they go on with these between two tokens,
    and each token says which version wrote it; or the weights wait until all have ended, and new ones until then."""
    recompute_kv: bool = True
    """Compute the cached keys and values of such responses again with the new weights. False: keep those of the old,
    which is cheaper; the recorded log-probs are those of the distribution that was sampled from either way."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Further options of the engine, passed on unchanged. With `vllm`: any option of its `LLM` class, for example
    `max_num_seqs: 256`."""


@dataclass
class TeacherConfig:
    """Teacher actors: models that score what the student wrote."""

    model: str = "???"
    """Hugging Face model directory or hub name; of an `http` teacher the name it is served under."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer of a teacher whose tokens are not the student's, most often `model` again.
    It reads the student's text, and its log-probs are brought back to the student's tokens. Null: the student's."""
    domains: list[str] = field(default_factory=list)
    """Domains of the prompts that it scores. Empty: those that no other teacher names. Where several teachers score a
    prompt, their mixture is the teacher."""
    weight: float = number(1.0, above=0)
    """Its share in such a mixture, in probability space, relative to the others' shares."""
    prompt_template: str | None = None
    """What this teacher reads in place of the prompt (of its last user message): `{prompt}` and any field of the record,
    for example `{prompt} The reference answer is {answer}.` The student never sees it."""
    backend: str = "transformers"
    """What computes its log-probs. `transformers`: the model in the actor's process; `vllm`: a vLLM engine there, for
    models over several GPUs; `http`: servers that run elsewhere (`urls`); or `package.module:Class` of your own
    (docs/extending.md)."""
    tensor_parallel_size: int = number(1, minimum=1)
    """GPUs that one actor spreads the weights over: by vLLM, or, with `transformers`, by the plan of the model's
    architecture, a process for each."""
    engine: dict[str, Any] = field(default_factory=dict)
    """With `vllm`: any further option of vLLM's engine, for example `quantization: fp8`."""
    urls: list[str] = field(default_factory=list)
    """With `http`: OpenAI-compatible servers of this teacher that return log-probs of prompts, each ending in `/v1`."""
    api_key_variable: str | None = None
    """With `http`: the environment variable, on the actors' nodes, that holds the servers' key."""
    timeout_seconds: float = number(120.0, above=0)
    """With `http`: how long one request may take."""
    requests_per_url: int = number(8, minimum=1)
    """With `http`: requests that one actor has under way at each server."""
    replicas: int = number(1, minimum=1)
    """How many actors of this teacher."""
    gpus_per_replica: float | None = number(None, minimum=0)
    """GPUs of one actor. Null: one, or a share where the cluster has a single GPU."""
    cpus_per_replica: float = number(1.0, minimum=0)
    """CPU cores that Ray reserves for one actor."""
    resources: dict[str, float] = field(default_factory=dict)
    """Further resources of Ray that one actor takes, as for `rollout.resources`."""
    dtype: Dtype = "bfloat16"
    """Data type of the weights. Log-probs are always computed in float32."""
    signal: Literal["sampled", "topk", "student_topk", "full", "hidden"] = "sampled"
    """What is sent for each token: its own log-prob; with those of the teacher's `top_k` tokens, of the student's, or of
    the whole vocabulary; or `hidden`, the states that the learner turns into the whole vocabulary's."""
    top_k: int = number(64, minimum=2)
    """Size of the support when `signal` is `topk` or `student_topk`."""
    ema_decay: float | None = number(None, above=0, maximum=1)
    """The teacher follows the student: from its initial weights on, after each update, decay x teacher + (1 - decay) x
    student. `model` is the student's. Null: it is frozen."""
    microbatch_tokens: int = number(16384, minimum=1)
    """Tokens of one forward pass, in which trajectories lie end to end, unpadded."""
    head_chunk_tokens: int = number(1024, minimum=1)
    """Tokens that the language-model head is applied to at a time: [chunk, vocabulary] is the largest array."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you have read."""
