"""Real tokenizers of the kinds that models have, trained here in a moment on a few sentences."""

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import CHAT_TEMPLATE, make_tiny_tokenizer

CORPUS = [
    "The student writes, and the teacher reads what the student has written.",
    "7 + 8 = 15, 17 + 28 = 45, 117 + 228 = 345; the sum of the numbers is the answer.",
    "def add(first, second):\n    return first + second\n\n    # the answer",
    "Ein Schüler schreibt, die Lehrerin liest: größer, süßer, für über möglich.",
    "日本語の文章 日本語の文 日本 🙂🙂 😀",
] * 4


def byte_level(vocabulary: int = 500, eos: str = "<|end|>") -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2, Llama 3 and Qwen: a token may hold a part of a character. One word is no special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", eos, "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token="<|pad|>",
        chat_template="{% for m in messages %}<|{{ m.role }}|>{{ m.content }}" + eos + "\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )


def sentencepiece(vocabulary: int = 220) -> PreTrainedTokenizerFast:
    """Unigram with a space before the text and bytes for what it does not know, as of Llama 2 and Gemma."""
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.UnigramTrainer(vocab_size=vocabulary, show_progress=False, unk_token="<unk>")
    trained.train_from_iterator([line.replace("日本語", "") for line in CORPUS], trainer)
    scores = {token: -8.0 - id_ / 100 for token, id_ in trained.get_vocab().items() if token != "<unk>"}
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*((token, 0.0) for token in special), *((f"<0x{value:02X}>", -20.0) for value in range(256))]
    tokenizer = Tokenizer(models.Unigram([*pieces, *sorted(scores.items())], unk_id=0, byte_fallback=True))
    tokenizer.normalizer = trained.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        chat_template=CHAT_TEMPLATE.replace("<eos>", "</s>"),
    )  # fmt: skip


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "characters": make_tiny_tokenizer,
    "byte_level": byte_level,
    "finer_byte_level": lambda: byte_level(300, "<|eot|>"),
    "sentencepiece": sentencepiece,
}
