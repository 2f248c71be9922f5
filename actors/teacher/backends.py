"""The table of teacher backends: the abilities and the class of each. Standard library only.

`teachers.<name>.backend` names a row of BACKENDS, or a user's class, `package.module:Class`, whose class attribute
`backend` is such a row. Code outside this folder reads a backend's abilities from its row; it never compares names.
"""

import inspect
from dataclasses import dataclass
from typing import Any, get_args

from actors.config import Signal, TeacherConfig
from actors.errors import UserError
from actors.import_path import check_call, import_object, is_import_path

SIGNALS: tuple[str, ...] = get_args(Signal)
"""All values of `teachers.<name>.signal`."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What one teacher backend can do. Example: Backend(signals=("sampled", "topk"), has_model_files=True)."""

    signals: tuple[str, ...] = ("sampled",)
    """Values of `signal` that it can send. Each of them fills other fields of TeacherScores."""
    gpu_signals: tuple[str, ...] = ()
    """Those of `signals` that it can send on a GPU only."""
    generates: bool = True
    """It has `generate`, which answers prompts greedily: needed where `evaluation.teacher` measures its accuracy."""
    samples: bool = False
    """It has `sample`, which writes the responses that the student copies: needed for the estimator `sft`."""
    follows_student: bool = False
    """It has `load_weights`, which takes the student's averaged weights after each update: needed for `ema_decay`."""
    has_model_files: bool = False
    """`model` is a Hugging Face model directory or hub name. Its files and its tokenizer are then checked before the
    start, and its context length bounds the prompts. False: `model` is only a name that is passed on."""
    tries_length: bool = False
    """It has `full_length_test(tokens)`, which raises UserError if it cannot score a text of as many tokens: for models whose
    context length is not known before the start."""
    uses_gpu: bool = False
    """An actor reserves `tensor_parallel_size` GPUs where `gpus_per_replica` is null and the cluster has GPUs."""
    measures_gpu: bool = False
    """It sizes itself by how the free memory of its GPU changes while it starts. On a GPU with other roles it starts last."""
    tempers: bool = False
    """It scores at `Teacher.temperature`. False: it sends log-probs at temperature 1 only, which cannot be turned into
    others, since that takes the whole distribution."""
    tensor_parallel: bool = False
    """`tensor_parallel_size` may be above 1."""
    settings: tuple[str, ...] = ()
    """Those of OWN_SETTINGS that it reads. They are refused for other backends, which would ignore them."""
    class_path: str = ""
    """Import path of its class. Empty for a class of the user's own, which is named in the configuration."""
    sharded_class_path: str = ""
    """Import path of the class for a `tensor_parallel_size` above 1, where that is another one. It needs a model that
    transformers has a tensor-parallel plan for."""


NAMED_TOKENS = (
    "sampled, topk or full, or backend: transformers: vLLM scores named tokens with its second model runner only, which "
    "needs a GPU with Triton, and which some models and options do not have"
)
"""Expected in place of `student_topk` where a vLLM engine cannot send it."""
FULL_BYTES = 4 << 30
"""Memory for the log-probs of one text over the whole vocabulary, in an engine's process."""
ENTRY_BYTES = 24
"""Of one log-prob there: an id of 8 bytes and a float of 4, and once more while the chunks of a text are joined."""


def full_tokens(vocabulary: int) -> int:
    """The longest text, in tokens, whose log-probs over the whole vocabulary a vLLM engine can send."""
    return FULL_BYTES // (vocabulary * ENTRY_BYTES)


def refuse_full(teacher: TeacherConfig, key: str, vocabulary: int, response_tokens: int) -> None:
    """UserError where a vLLM teacher would have to hold more than FULL_BYTES of one response over the whole vocabulary.

    key: of the teacher's section. vocabulary: rows of its output layer. response_tokens: of the longest response.
    """
    most = full_tokens(vocabulary)
    if teacher.backend == "vllm" and teacher.signal == "full" and response_tokens + 1 > most:
        needed = (response_tokens + 1) * vocabulary * ENTRY_BYTES / 1e9
        found = (
            f"full: {response_tokens + 1:,} tokens x {vocabulary:,} log-probs x {ENTRY_BYTES} bytes = {needed:.1f} GB"
        )
        expected = f"at most {FULL_BYTES / 1e9:.1f} GB in one piece, {most:,} tokens; or topk, or backend: transformers"
        raise UserError(f"{key}.signal", found, f"{expected}, whose signal hidden holds no such array")


def refuse_without_gpu(teacher: TeacherConfig, key: str, gpus: float) -> None:
    """UserError where the signal needs a GPU and an actor has none. key: of the teacher's section."""
    if not gpus and teacher.signal in backend_of(teacher, key).gpu_signals:
        raise UserError(f"{key}.signal", f"{teacher.signal} without a GPU", NAMED_TOKENS)


OWN_SETTINGS = ("urls", "api_key_variable", "engine")
"""Keys of TeacherConfig that only some backends read. They are empty by default."""

BACKENDS = {
    "transformers": Backend(
        class_path="actors.teacher.local:LocalTeacher",
        sharded_class_path="actors.teacher.tensor_parallel:ShardedTeacher",
        signals=SIGNALS,
        samples=True,
        follows_student=True,
        has_model_files=True,
        uses_gpu=True,
        tempers=True,
        tensor_parallel=True,
    ),
    "vllm": Backend(
        class_path="actors.teacher.vllm_teacher:VllmTeacher",
        signals=("sampled", "topk", "full", "student_topk"),
        gpu_signals=("student_topk",),
        samples=True,
        has_model_files=True,
        uses_gpu=True,
        measures_gpu=True,
        tempers=True,
        tensor_parallel=True,
        settings=("engine",),
    ),
    "http": Backend(
        class_path="actors.teacher.http:HttpTeacher",
        tries_length=True,
        signals=("sampled", "topk"),
        samples=True,
        settings=("urls", "api_key_variable"),
    ),
}
"""The built-in backends by name."""


def backend_of(teacher: TeacherConfig, key: str = "teacher") -> Backend:
    """The row of a teacher's backend. key: where the teacher's section stands, for example "teachers.default".

    A class of the user's own is imported. UserError: no such backend or class, or the class lacks its row, or a method
    that the row promises.
    """
    name = teacher.backend
    if name in BACKENDS:
        return BACKENDS[name]
    if not is_import_path(name):
        expected = f"{', '.join(BACKENDS)}, or package.module:Class of your own"
        raise UserError(f"{key}.backend", name, expected, BACKENDS)
    return _own_backend(name, f"{key}.backend")


def _own_backend(name: str, key: str) -> Backend:
    """The row of a user's class, after a check that the class has what its row promises."""
    found: Any = import_object(name, key, "a class")
    row = getattr(found, "backend", None)
    if not isinstance(found, type) or not isinstance(row, Backend):
        expected = "a class with the class attribute `backend = Backend(...)` (docs/extending.md)"
        raise UserError(key, f"{name} without the attribute `backend`", expected)
    promised = {
        "generate": row.generates,
        "sample": row.samples,
        "load_weights": row.follows_student,
        "full_length_test": row.tries_length,
    }
    needed = ["score", "score_each", "status", *(method for method, has in promised.items() if has)]
    if hasattr(found, "score_tokens"):  # the class extends Teacher, whose `score` calls this method
        needed.append("score_tokens")
    methods = {method: getattr(found, method, None) for method in needed}
    missing = [name for name, own in methods.items() if own is None or getattr(own, "__isabstractmethod__", False)]
    unknown = [signal for signal in row.signals if signal not in SIGNALS]
    # Ray would make the whole actor asynchronous, and run its calls side by side.
    coroutines = [method for method, _ in inspect.getmembers(found, inspect.iscoroutinefunction)]
    subclass = "a subclass of actors.teacher.base.Teacher with these methods (docs/extending.md)"
    for what, expected in (
        (f"without {', '.join(missing)}" if missing else "", subclass),
        (f"with the coroutine {coroutines[0]}" if coroutines else "", "methods that are no coroutines"),
        (f"with the signal {unknown[0]}" if unknown else "", f"some of {', '.join(SIGNALS)}"),
        (
            "with the signal hidden" if "hidden" in row.signals and not row.has_model_files else "",
            "has_model_files=True: the learner reads the output layer from the files of `model`",
        ),
    ):
        if what:
            raise UserError(key, f"{name} {what}", expected)
    check_call(found, 3, (), key, name, "Class(config, key, vocabulary)")
    return row


def teacher_class(teacher: TeacherConfig, key: str = "teacher") -> type:
    """The class whose instances are this teacher's actors. Imports it. UserError: see `backend_of`."""
    row = backend_of(teacher, key)
    path = row.sharded_class_path if teacher.tensor_parallel_size > 1 and row.sharded_class_path else row.class_path
    return import_object(path or teacher.backend, f"{key}.backend", "a class")


def needs_plan(teacher: TeacherConfig) -> bool:
    """Whether this teacher's layers are divided among several processes by transformers' tensor-parallel plan."""
    return teacher.tensor_parallel_size > 1 and bool(backend_of(teacher).sharded_class_path)


def teacher_gpus(teacher: TeacherConfig) -> float:
    """GPUs of one actor where `gpus_per_replica` is null and actors do not share GPUs."""
    return float(teacher.tensor_parallel_size) if backend_of(teacher).uses_gpu else 0.0
