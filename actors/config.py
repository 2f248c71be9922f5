"""Configuration of rollout and teacher actors, prompts and sampling. Standard library only.

`number(...)` attaches the allowed range to a field; `cluster/config.py` checks it where the full key is known.
`"???"` marks a required value. Every field has a class of change, `Change`: by `setting(...)`, by `number(..., change=...)`, or
by `@changing(...)` for all fields of a dataclass that name none. A field without one fails a test.
"""

import shlex
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

Dtype = Literal["float32", "bfloat16", "float16"]
Signal = Literal["sampled", "topk", "student_topk", "full", "hidden"]


Change = Literal["free", "same contents", "on request", "never"]
"""Whether a campaign that has begun may go on with another value of a key (docs/changes.md is made from it).

`free`: it does not change the mathematics: memory, numbers of actors, resources, where things are. `same contents`: a path or
name that is free while the fingerprint of what is there stays the same, and on request otherwise. `on request`: it changes
the mathematics from here on; `--allow-change KEY` allows it, and it is recorded. `never`: it is another campaign.
A field that holds a section needs none; with one (`prompts: PromptsConfig | None = setting(None, "free")`) it goes before
those of the fields below.
"""
Section = TypeVar("Section", bound=type)


def setting(default: Any, change: Change) -> Any:
    """A dataclass field with a class of change. default: the value, or a function that makes it (`list`, a dataclass)."""
    if callable(default):
        return field(default_factory=default, metadata={"change": change})
    return field(default=default, metadata={"change": change})


def number(
    default: Any,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    change: Change | None = None,
) -> Any:
    """A dataclass field with a range: minimum <= value <= maximum, value > above; and a class of change."""
    range_ = {"minimum": minimum, "above": above, "maximum": maximum}
    return field(default=default, metadata=range_ if change is None else {**range_, "change": change})


def changing(change: Change) -> Callable[[Section], Section]:
    """Gives a class of change to every field of a dataclass that has none of its own."""

    def give(section: Section) -> Section:
        for item in fields(section):
            if "change" not in item.metadata and not holds_section(item):
                item.metadata = MappingProxyType({**item.metadata, "change": change})
        return section

    return give


def holds_section(item: Field[Any]) -> bool:
    """Whether a field's value is a dataclass, or has such by name; their own fields then have the classes."""
    return any(is_dataclass(kind) for kind in (item.type, *get_args(item.type)))


@changing("never")
@dataclass
class LoraConfig:
    """Low-rank adapters, trained in place of the weights (LoRA): less memory, and a small adapter in each checkpoint.

    Needs the library peft: `pip install peft accelerate`.
    """

    rank: int = number(16, minimum=1)
    """Rank of the two thin matrices beside each layer."""
    alpha: float = number(32.0, above=0)
    """The adapter's output is multiplied by alpha / rank."""
    target_modules: list[str] = field(default_factory=list)
    """Layers with an adapter, by the end of their names, for example `q_proj`. Empty: all linear layers but the output."""
    rank_stabilised: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Train the length of each row of a weight separately from its direction (DoRA, arXiv 2402.09353)."""
    publish: Literal["merged", "adapter"] = setting("merged", "free")
    """What engines load. `merged`: the weights with the adapter added; engines sample at full speed. `adapter`: the adapter
    alone; versions are small, and vLLM's LoRA kernels compute it beside the model's own weights."""


@dataclass
class StudentConfig:
    """The policy that is trained."""

    model: str = setting("???", "same contents")
    """Hugging Face model directory or hub name: config, safetensors, tokenizer with a chat template."""
    revision: str | None = setting(None, "same contents")
    """Branch, tag or commit of a hub name. Null: its main branch. A campaign resolves it to a commit when it begins, writes
    that to its config.yaml, and keeps it: later processes and other nodes load the same, also where the branch has moved."""
    trust_remote_code: bool = setting(False, "free")
    """Run Python code that comes with the model. Set it only for code that you have read."""
    lora: LoraConfig | None = None
    """Adapters to train. Null: all weights are trained."""
    optimizer: Literal["keep", "new"] = setting("new", "never")
    """Where `model` is a checkpoint of another campaign: `keep` begins with its AdamW moments, `new` with none."""

    @property
    def source(self) -> str:
        """What is loaded: the model, with its revision."""
        return _at(self.model, self.revision)


def _at(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name}@{revision}"


def publishes_adapter(student: StudentConfig) -> bool:
    """Whether a weight version holds an adapter instead of a model."""
    return student.lora is not None and student.lora.publish == "adapter"


@changing("on request")
@dataclass
class SourceConfig:
    """Where records come from, and what their fields are called. One of `path` and `function`."""

    path: str | None = setting(None, "same contents")
    """A .jsonl or .parquet file (.jsonl.gz and .jsonl.zst too), a pattern of such files (`data/*.jsonl`, in the order of their
    names), a directory that `save_to_disk` wrote or that holds data files, or the name of a Hugging Face dataset, with its
    subset after a colon: `openai/gsm8k:main`."""
    split: str = "train"
    """Split to read when `path` is a Hugging Face dataset."""
    revision: str | None = setting(None, "same contents")
    """Branch, tag or commit of a Hugging Face dataset on the hub, as in `student.revision`."""
    streaming: bool = False
    """Read a Hugging Face dataset on the hub from its start as far as `limit`, without downloading all of it."""
    function: str | None = setting(None, "same contents")
    """`package.module:function` of your own, called with `function_arguments`: it returns an iterator of records, the same in
    every call (docs/data.md)."""
    function_arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `function`."""
    prompt_field: str = "prompt"
    """Field with the prompt: a string, or a list of chat messages with `role` and `content`."""
    response_field: str | None = None
    """Field with the response that `learner.objective.estimator: sft` trains on: a text, or chat messages that follow the
    prompt's. The prompt's own field, where that holds whole conversations: all turns of the assistant are trained on. Null: a
    teacher writes. Held-out prompts are read without it."""
    tools_field: str = "tools"
    """Field with the tools that the chat template describes, a list of JSON schemas. Records need not have it."""
    reference_field: str | None = "answer"
    """Field with the reference answer that verifiers read; null when there is none."""
    domain_field: str | None = None
    """Field with the prompt's domain, which selects its teachers (`teachers.<name>.domains`) and its verifier
    (`evaluation.verifiers`)."""
    limit: int | None = number(None, minimum=1)
    """Read at most this many records, from the start."""

    @property
    def origin(self) -> str:
        """What messages call the source."""
        return self.path or self.function or ""


@changing("on request")
@dataclass
class MixedSourceConfig(SourceConfig):
    """One of several sources of prompts."""

    weight: float | None = number(None, above=0)
    """How often its prompts are drawn, relative to the weights of the other sources. Null, for all sources: in proportion to
    their numbers of prompts. Held-out prompts have none: each is answered once."""
    domain: str | None = None
    """The domain of all its prompts, in place of `domain_field`."""


@changing("on request")
@dataclass
class PromptsConfig(SourceConfig):
    """Where prompts come from and how they are turned into tokens: one of `path`, `function` and `sources`."""

    sources: dict[str, MixedSourceConfig] = field(default_factory=dict)
    """Several sources by names of your choice, each with a path or a function and field names of its own."""
    chat: bool = True
    """Render with the tokenizer's chat template (a plain string becomes one user message). False: the text as it is."""
    chat_template_arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, for example `enable_thinking: false`. With `continue_final_message: true`
    every prompt ends with a message of the assistant, which the student continues."""
    max_prompt_tokens: int | None = number(None, minimum=1)
    """The longest prompt, in tokens as the student reads it. Null: what the contexts of student and teachers leave beside
    `sampling.max_response_tokens`."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What is done about a longer prompt. `drop`: it is left out, and counted."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Prompts that the student reads as the same text as an earlier one, of any source. `drop`: they are left out, and counted."""
    shuffle: bool = True
    """Visit the prompts in a new order in each epoch, determined by the campaign's seed. Each of several sources has its own."""

    def each_source(self, key: str) -> dict[str, SourceConfig]:
        """Configuration key -> source, for one source or several. key: of this section, for example "prompts"."""
        return {f"{key}.sources.{name}": one for name, one in self.sources.items()} or {key: self}

    @property
    def origin(self) -> str:
        """What messages call the sources."""
        return ", ".join(one.origin for one in self.sources.values()) or super().origin

    @property
    def has_references(self) -> bool:
        """Whether prompts may have a reference answer."""
        return any(one.reference_field is not None for one in self.each_source("").values())

    @property
    def has_responses(self) -> bool:
        """Whether the prompts come with responses."""
        return any(one.response_field is not None for one in self.each_source("").values())

    @property
    def has_domains(self) -> bool:
        """Whether prompts may have a domain."""
        named = any(one.domain is not None for one in self.sources.values())
        return named or any(one.domain_field is not None for one in self.each_source("").values())


@changing("on request")
@dataclass
class TrainingPromptsConfig(PromptsConfig):
    """The prompts of training, and which of them are asked."""

    keep: Literal["all", "margin"] = "all"
    """Which prompts are asked. `margin`: not those on which student and teacher agree already, whose running
    estimate of the reverse KL is below `margin`; they are asked again after four epochs (docs/data.md)."""
    margin: float = number(0.02, above=0)
    """With `keep: margin`: the reverse KL, in nats a token, below which a prompt is passed over."""
    curriculum: Literal["none", "easy_first", "hard_first"] = "none"
    """The order by that estimate: first those with the smallest reverse KL, or with the largest. All of
    them from half of the campaign on."""


@changing("on request")
@dataclass
class VerifierConfig:
    """How a response is judged: a function of the response and the reference answer, which returns a reward."""

    name: str = "exact"
    """`exact`, `regex`, `numeric`, `math` (needs math-verify), or `package.module:function` of your own, with the
    signature `(response: str, reference: str | None) -> float`: 1.0 for right, 0.0 for wrong (docs/extending.md)."""
    pattern: str | None = None
    """A regular expression. The verifier gets what its last match captures (group 1, or the match) in the response.
    Needed by `regex`."""
    timeout_seconds: float = number(10.0, above=0)
    """Time limit of one verdict. Verifiers run in a process of their own, which is ended where it is passed; a response
    without a verdict counts as wrong, and an event says why. 20 of them in a row end the campaign."""


@changing("on request")
@dataclass
class SamplingConfig:
    """The distribution from which trajectories are sampled."""

    temperature: float = number(1.0, above=0)
    """Divides the student's logits, in sampling and in the objective."""
    top_p: float = number(1.0, above=0, maximum=1)
    """Nucleus sampling: keep the smallest set of tokens with at least this probability. 1 keeps all."""
    top_k: int = number(0, minimum=0)
    """Keep the k most likely tokens. 0 keeps all."""
    max_response_tokens: int = number(1024, minimum=1)
    """A longer response is cut here and recorded as truncated."""
    response_tokens_schedule: list[list[int]] = field(default_factory=list)
    """Other limits in training, from an update on: `[[1, 64], [200, 256]]` cuts responses at 64 tokens from update 1 on, and at
    256 from update 200 on. Before the first it is `max_response_tokens`, above which none may be; evaluations keep that."""
    stop_token_ids: list[int] = field(default_factory=list)
    """More tokens that end a response, besides those of the tokenizer and of generation_config.json."""

    def response_tokens_at(self, update: int) -> int:
        """The length limit of responses that are sampled for this update, from 1."""
        return scheduled(update, self.response_tokens_schedule, self.max_response_tokens)


def scheduled(update: int, schedule: list[list[int]], before: int) -> int:
    """The value of a schedule at an update; before its first entry: `before`."""
    begun = [value for first, value in schedule if first <= update]
    return begun[-1] if begun else before


@changing("on request")
@dataclass
class EnvironmentConfig:
    """What answers the student between its turns (docs/environments.md). Each prompt then begins an episode of several turns,
    and rewards come from the environment, in training and in evaluations."""

    name: str | None = None
    """The environment: `package.module:Class` of your own, with `async def reset(record, episode)` and
    `async def step(message)`. Either this or `command`."""
    command: list[str] = field(default_factory=list)
    """A program that plays one episode, and its arguments: `[python, agent.py]`. It asks the student through an
    OpenAI-compatible endpoint (docs/environments.md)."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class."""
    tool_parser: str | None = None
    """The parser of vLLM that finds the student's tool calls (`hermes` for Qwen, `llama3_json`, `mistral` …). Null: the
    environment gets the text as it is."""
    earlier_turns: Literal["template", "written"] = "template"
    """The text that a turn follows. `template`: the chat template must write earlier turns as the student has read and written
    them; one that does not (some drop the reasoning of earlier turns) is refused. `written`: it may, and the student goes on
    from its own tokens all the same."""
    max_turns: int = number(16, minimum=1)
    """Turns of the student. An episode that is not over then is truncated; so is one whose response, with all that the
    environment wrote between the turns, has `sampling.max_response_tokens`."""
    turns_schedule: list[list[int]] = field(default_factory=list)
    """Other limits in training, from an update on: `[[1, 2], [100, 8]]` ends episodes after 2 turns from update 1 on, and after
    8 from update 100 on. Before the first it is `max_turns`, above which none may be; evaluations keep that."""
    max_turn_tokens: int | None = number(None, minimum=1)
    """Tokens of one turn. A longer one is cut there, and the environment answers it as it is. Null: a turn may take all the room
    that the response has left, and one that does ends the episode as truncated."""
    listen: Literal["loopback", "network"] = setting("loopback", "free")
    """Where programs reach the endpoint. `loopback`: on the environment actor's own machine. `network`: at the address by which
    the cluster knows that machine, for programs in containers or on other machines (docs/security.md)."""
    episodes_per_replica: int | None = number(None, minimum=1, change="free")
    """Episodes that one environment actor hosts at a time; others wait, which counts in no time limit. Null: all that there are."""
    step_timeout_seconds: float = number(60.0, above=0, change="free")
    """Time limit of `reset` and of each `step`."""
    episode_timeout_seconds: float = number(600.0, above=0, change="free")
    """Time limit of one attempt at an episode, the student's turns included."""
    attempts: int = number(3, minimum=1, change="free")
    """How often an episode is begun (its environment raised, took too long, or its process died) before it is dropped, with
    the reason, and replaced."""
    away_timeout_seconds: float = number(1800.0, above=0, change="free")
    """How long something that an environment asks, such as a server, is waited for while each attempt finds it away; such an
    attempt then counts in `attempts` (docs/environments.md)."""
    replicas: int = number(1, minimum=1, change="free")
    """Number of environment actors. Each hosts many episodes at once."""
    cpus_per_replica: float = number(1.0, minimum=0, change="free")
    """CPU cores that Ray reserves for one actor."""
    resources: dict[str, float] = setting(dict, "free")
    """Custom Ray resources that one actor reserves, as in `rollout.resources`."""

    @property
    def gpus_per_replica(self) -> float:
        """GPUs of one actor: none."""
        return 0.0

    def turns_at(self, update: int) -> int:
        """The limit of turns of episodes that are played for this update, from 1."""
        return scheduled(update, self.turns_schedule, self.max_turns)

    @property
    def key(self) -> str:
        """The key that says what the environment is."""
        return "environment.command" if self.command else "environment.name"

    @property
    def title(self) -> str:
        """What it is, for messages."""
        return shlex.join(self.command) if self.command else str(self.name)


@dataclass
class RolloutConfig:
    """Rollout actors: inference engines that sample trajectories."""

    backend: str = setting("vllm", "on request")
    """The engine: `vllm`, or `package.module:Class` of your own (docs/extending.md)."""
    replicas: int = number(1, minimum=1, change="free")
    """Number of rollout actors."""
    gpus_per_replica: float | None = number(None, minimum=0, change="free")
    """GPUs of one actor. Null: one for each tensor-parallel rank, or, where the cluster has a single GPU, a share of it. Below
    1: a share of a GPU, to which the actor keeps (docs/scaling.md)."""
    cpus_per_replica: float = number(1.0, minimum=0, change="free")
    """CPU cores that Ray reserves for one actor."""
    resources: dict[str, float] = setting(dict, "free")
    """Custom Ray resources that one actor reserves. They keep a role on the nodes meant for it: a node started with
    `ray start --resources='{"big_memory": 8}'` takes eight actors with `resources: {big_memory: 1}`."""
    tensor_parallel_size: int = number(1, minimum=1, change="free")
    """GPUs over which one engine shards its weights."""
    dtype: Dtype = setting("bfloat16", "on request")
    """Data type of the engine's weights, and of the weight versions that the learner publishes."""
    on_new_weights: Literal["continue", "wait"] = setting("continue", "on request")
    """What happens to running responses when new weights arrive. `continue`: they continue on the new weights from the next
    token, and each token records its version. `wait`: the weights wait until all have ended, and no new response starts."""
    recompute_kv: bool = setting(True, "on request")
    """Recompute the cached keys and values of running responses with the new weights. False: keep the old ones, which is
    cheaper. In both cases the recorded log-probs are those of the distribution that was sampled from."""
    engine: dict[str, Any] = setting(dict, "free")
    """Further options of the engine, passed on unchanged. With `vllm`: any option of its `LLM` class, for example
    `max_num_seqs: 256`. Where they are not given, `max_model_len` is the longest prompt and response, and
    `gpu_memory_utilization` follows from the share of a GPU."""


@dataclass
class TeacherConfig:
    """Teacher actors: models that score the student's responses."""

    model: str = setting("???", "same contents")
    """Hugging Face model directory or hub name; for an `http` teacher, the name under which it is served."""
    revision: str | None = setting(None, "same contents")
    """Branch, tag or commit of a hub name, as in `student.revision`."""
    tokenizer: str | None = setting(None, "same contents")
    """Directory or hub name of the teacher's tokenizer, where it is not the student's; most often the same as `model`. The
    teacher reads the student's text, and its log-probs are mapped back to the student's tokens. Null: the student's."""
    tokenizer_revision: str | None = setting(None, "same contents")
    """Branch, tag or commit of the tokenizer's hub name. Null: that of the model, where it is the same name."""
    domains: list[str] = setting(list, "on request")
    """Domains of the prompts that it scores. Empty: the domains that no other teacher names. Where several teachers score
    a prompt, the student learns from their mixture."""
    weight: float = number(1.0, above=0, change="on request")
    """Its weight in such a mixture of probabilities, relative to the other teachers' weights."""
    prompt_template: str | None = setting(None, "on request")
    """Text that this teacher reads in place of the prompt (of its last user message), with `{prompt}` and any field of the
    record: `{prompt} The reference answer is {answer}.` The student never sees it."""
    backend: str = setting("transformers", "on request")
    """What computes its log-probs. `transformers`: the model in the actor's process. `vllm`: a vLLM engine there, for
    models over several GPUs. `http`: servers that run elsewhere (`urls`). Or `package.module:Class` of your own
    (docs/extending.md)."""
    tensor_parallel_size: int = number(1, minimum=1, change="free")
    """GPUs over which one actor shards the weights: by vLLM, or, with `transformers`, by the plan of the model's
    architecture, with one process for each GPU."""
    engine: dict[str, Any] = setting(dict, "on request")
    """With `vllm`: further options of vLLM's engine, for example `quantization: fp8`. With a class of your own: its
    options."""
    urls: list[str] = setting(list, "free")
    """With `http`: URLs of OpenAI-compatible servers that return log-probs of prompts, each ending in `/v1`."""
    api_key_variable: str | None = setting(None, "free")
    """With `http`: the environment variable, on the actors' nodes, that holds the servers' key."""
    timeout_seconds: float = number(120.0, above=0, change="free")
    """With `http`: time limit of one request."""
    away_timeout_seconds: float = number(1800.0, above=0, change="free")
    """With `http`: how long the servers are waited for while none of them answers; then the campaign ends with an error and
    a checkpoint. While one of several answers, it takes the work of the others."""
    requests_per_url: int = number(8, minimum=1, change="free")
    """With `http`: concurrent requests of one actor to each server."""
    replicas: int = number(1, minimum=1, change="free")
    """Number of actors of this teacher."""
    gpus_per_replica: float | None = number(None, minimum=0, change="free")
    """GPUs of one actor. Null: one, or a share of it where the cluster has a single GPU. Below 1: as in the section
    `rollout`."""
    cpus_per_replica: float = number(1.0, minimum=0, change="free")
    """CPU cores that Ray reserves for one actor."""
    resources: dict[str, float] = setting(dict, "free")
    """Custom Ray resources that one actor reserves, as in `rollout.resources`."""
    dtype: Dtype = setting("bfloat16", "on request")
    """Data type of the weights. Log-probs are computed in float32."""
    signal: Signal = setting("sampled", "on request")
    """What the teacher sends for each token. `sampled`: the token's log-prob. The others add log-probs over a support:
    `topk` the teacher's top `top_k` tokens, `student_topk` the student's, `full` the whole vocabulary, `hidden` the hidden
    states from which the learner computes the whole vocabulary."""
    temperature: float | None = number(None, above=0, change="on request")
    """Divides this teacher's logits. Null: the student's, `sampling.temperature`, so that a teacher with the student's
    weights is the student's own policy. 1: its distribution as it is; an `http` teacher can send no other."""
    top_k: int = number(64, minimum=2, change="on request")
    """Size of the support when `signal` is `topk` or `student_topk`."""
    ema_decay: float | None = number(None, above=0, maximum=1, change="never")
    """The teacher follows the student. After each update its weights are decay x teacher + (1 - decay) x student, starting
    from the student's initial weights; `model` is the student's. Null: the teacher is frozen."""
    microbatch_tokens: int = number(16384, minimum=1, change="free")
    """Tokens of one forward pass. Trajectories are packed end to end, without padding."""
    head_chunk_tokens: int = number(1024, minimum=1, change="free")
    """Tokens to which the head is applied at a time: [chunk, vocabulary] is the largest array."""
    trust_remote_code: bool = setting(False, "free")
    """Run Python code that comes with the model. Set it only for code that you have read."""

    @property
    def source(self) -> str:
        """What is loaded: the model, with its revision."""
        return _at(self.model, self.revision)

    @property
    def tokenizer_source(self) -> str | None:
        """The tokenizer of its own, with its revision; None: it has none."""
        if self.tokenizer is None:
            return None
        same = self.tokenizer_revision is None and self.tokenizer == self.model
        return _at(self.tokenizer, self.revision if same else self.tokenizer_revision)
