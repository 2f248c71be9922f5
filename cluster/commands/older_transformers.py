"""Keys that transformers 4 reads, beside those of transformers 5, in the files of an exported model.

Of a model that transformers 5 has written, release 4 refuses the tokenizer; and it would not see `rope_parameters`: it takes the
architecture's own base for the rotary embedding instead, and the model says something else, without a word. Release 5 reads the
older keys too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
ANY_TOKENIZER = "TokenizersBackend", "PreTrainedTokenizerFast"
"""What transformers 5 and 4 call a tokenizer that is all in tokenizer.json. Release 5 knows both names."""


def readable_by_both(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a model directory with these keys. A file that needs none is the same, byte for byte."""
    changes = {CONFIG: _with_rope, TOKENIZER_CONFIG: _with_tokenizer}
    return {
        name: changes[base](content) if (base := Path(name).name) in changes else content
        for name, content in files.items()
    }


def _with_rope(content: bytes) -> bytes:
    config = json.loads(content)
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict) or "rope_theta" in part or "rope_scaling" in part:
            continue
        rope = part.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:  # else none, or others for each kind of layer
            own = {key: value for key, value in rope.items() if key != "rope_theta"}
            part["rope_theta"] = rope["rope_theta"]
            part["rope_scaling"] = None if own.get("rope_type", "default") == "default" else own
    return _same_or_new(content, config)


def _with_tokenizer(content: bytes) -> bytes:
    config = json.loads(content)
    newer, older = ANY_TOKENIZER
    if config.get("tokenizer_class") == newer:
        config["tokenizer_class"] = older
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return _same_or_new(content, config)


def _same_or_new(content: bytes, config: Any) -> bytes:
    if config == json.loads(content):
        return content
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
