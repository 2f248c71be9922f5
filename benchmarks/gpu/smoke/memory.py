"""The formula of docs/scaling.md for one rank, by item."""

from benchmarks.gpu.shapes import SHAPES


def parameters(shape: str) -> int:
    """Of a Qwen3 of this shape."""
    s = SHAPES[shape]
    width, keys = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
    hidden, inner = s["hidden_size"], s["intermediate_size"]
    layer = hidden * (2 * width + 2 * keys + 3 * inner) + 2 * hidden + 2 * s["head_dim"]
    tables = s["vocab_size"] * hidden * (1 if s["tie_word_embeddings"] else 2)
    return s["num_hidden_layers"] * layer + tables + hidden


def formula(shape: str, tokens: int, *, offload: bool, chunk: int = 1024) -> dict[str, float]:
    """Bytes by item: one rank, bfloat16, gradient checkpointing, full fine-tuning."""
    s, count = SHAPES[shape], parameters(shape)
    hidden, vocabulary = s["hidden_size"], s["vocab_size"]
    return {
        "masters and gradients": 8.0 * count,
        "moments": 0.0 if offload else 8.0 * count,
        "head and embedding: casts and gradients": 14.0 * vocabulary * hidden,
        "layers: casts": 8.0 * count / s["num_hidden_layers"],
        "kept inputs of layers": 4.0 * tokens * hidden * s["num_hidden_layers"],
        "one layer again": 60.0 * tokens * hidden,
        "a chunk of the head": 12.0 * chunk * vocabulary,
    }
