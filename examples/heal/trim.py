"""Trims the vocabulary of a language model: keeps the first merges of its tokenizer, and the rows of the tokens that are left.

    python -m examples.heal.trim SOURCE OUTPUT [--tokens 16384]

SOURCE: a directory or a hub name of a model whose tokenizer is a byte-level BPE, as of SmolLM2, Llama 3 or Qwen. OUTPUT gets a
Hugging Face directory: the weights in the dtype of the source, with an embedding and a head of so many rows, and a tokenizer of
its own, which cuts the same text into more tokens. Every token that is no merge stays: bytes, and special tokens.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from actors.data.models import find_model, load_config
from actors.errors import UserError

COPIED = ("*.jinja", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json")
CONFIGS = ("config.json", "generation_config.json")
"""Files that name tokens by their ids, in keys that end with `_token_id`."""


def read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def write(file: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def named(content: dict[str, Any]) -> dict[str, list[int]]:
    """Key -> the ids that a configuration names there."""
    found = {key: value for key, value in content.items() if key.endswith("_token_id") and value is not None}
    return {key: value if isinstance(value, list) else [value] for key, value in found.items()}


def renumbered(content: dict[str, Any], ids: dict[int, int]) -> dict[str, Any]:
    """A configuration that names the same tokens by their new ids. ids: old -> new."""
    new = {key: [ids[id_] for id_ in old] for key, old in named(content).items()}
    return content | {key: own if isinstance(content[key], list) else own[0] for key, own in new.items()}


def trimmed_tokenizer(content: dict[str, Any], tokens: int, needed: set[int]) -> tuple[dict[str, Any], list[int]]:
    """(a tokenizer.json of so many tokens, the old id of each of them, ascending). needed: ids that stay in any case.

    UserError: it is no byte-level BPE, or cannot have so many tokens.
    """
    from tokenizers import Tokenizer

    model, added = content["model"], content["added_tokens"]
    decoder = content["decoder"] or {"type": "none"}
    if model["type"] != "BPE" or decoder["type"] != "ByteLevel":
        found = f"a tokenizer {model['type']} with the decoder {decoder['type']}"
        raise UserError("SOURCE", found, "BPE with the decoder ByteLevel")
    vocabulary: dict[str, int] = model["vocab"]
    results = [first + second for first, second in model["merges"]]
    kept = needed | {token["id"] for token in added} | {vocabulary[token] for token in vocabulary.keys() - set(results)}
    total = len({*vocabulary.values(), *kept})
    if not len(kept) < tokens < total:
        raise UserError(
            "--tokens", tokens, f"{len(kept) + 1} to {total - 1}: it has {total}, {len(kept)} of which stay"
        )
    merges = 0
    while len(kept) < tokens or vocabulary[results[merges]] in kept:
        kept.add(vocabulary[results[merges]])
        merges += 1
    ids = {old: new for new, old in enumerate(sorted(kept))}
    vocabulary = {token: ids[old] for token, old in vocabulary.items() if old in ids}
    # Some tokenizers list all ways to a token, also those over a longer token, which comes later.
    pairs = [pair for pair in model["merges"][:merges] if all(part in vocabulary for part in pair)]
    found = content | {
        "model": model | {"vocab": vocabulary, "merges": pairs},
        "added_tokens": [token | {"id": ids[token["id"]]} for token in added],
        "post_processor": _renumbered_step(content["post_processor"], ids),
        "padding": None,  # names a token by its id; whoever pads says so
    }
    Tokenizer.from_str(json.dumps(found))
    return found, sorted(kept)


def _renumbered_step(step: dict[str, Any] | None, ids: dict[int, int]) -> dict[str, Any] | None:
    """A post-processor, which adds special tokens to texts, with new ids."""
    kind = step["type"] if step else "ByteLevel"
    if step and kind == "Sequence":
        return step | {"processors": [_renumbered_step(one, ids) for one in step["processors"]]}
    if step and kind == "TemplateProcessing":
        special = {
            name: one | {"ids": [ids[id_] for id_ in one["ids"]]} for name, one in step["special_tokens"].items()
        }
        return step | {"special_tokens": special}
    if kind != "ByteLevel":
        raise UserError("SOURCE", f"a tokenizer with the post-processor {kind}", "TemplateProcessing or ByteLevel")
    return step


def trimmed(source: Path, kept: list[int]) -> Any:
    """The model (transformers) with these rows [N] of its embedding and head, in the dtype of its files."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto", use_safetensors=True)
    ends = {id(end.weight): end for end in (model.get_input_embeddings(), model.get_output_embeddings())}  # one if tied
    with torch.no_grad():
        for values in (values for end in ends.values() for values in end.parameters(recurse=False)):
            values[: len(kept)] = values[torch.tensor(kept)]
    model.resize_token_embeddings(len(kept))
    return model


def trim(source: str, output: Path, tokens: int) -> tuple[list[int], int]:
    """Writes SOURCE with so many tokens to `output`: (the old ids that are kept, how many rows there were).

    UserError: `output` is there, or see `trimmed_tokenizer`.
    """
    from tokenizers import Tokenizer

    output = output.expanduser()
    if output.exists():
        raise UserError("OUTPUT", output, "a directory that does not exist yet")
    path = find_model(source, "SOURCE")
    rows = load_config(str(path), False, "SOURCE").vocab_size
    if not (path / "tokenizer.json").is_file():
        raise UserError("SOURCE", f"{path} without tokenizer.json", "a fast tokenizer")
    # The library's own form of the file: in older ones a merge is one text.
    content = json.loads(Tokenizer.from_file(str(path / "tokenizer.json")).to_str())
    known = {*content["model"].get("vocab", ()).values(), *(token["id"] for token in content["added_tokens"])}
    needed = {(name, key, id_) for name in CONFIGS for key, ids in named(read(path / name)).items() for id_ in ids}
    for name, key, id_ in sorted(needed):
        if id_ not in known:
            raise UserError(str(path / name), f"{key} {id_}", "the id of a token of its tokenizer")
    content, kept = trimmed_tokenizer(content, tokens, {id_ for _, _, id_ in needed})
    trimmed(path, kept).save_pretrained(output)
    for pattern in COPIED:
        for file in path.glob(pattern):
            shutil.copyfile(file, output / file.name)
    ids = {old: new for new, old in enumerate(kept)}
    write(output / "tokenizer.json", content)
    for name in CONFIGS:
        if (output / name).is_file():
            write(output / name, renumbered(read(output / name), ids))
    settings = read(output / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        of_old = settings["added_tokens_decoder"]
        settings["added_tokens_decoder"] = {str(ids[int(old)]): token for old, token in of_old.items()}
        write(output / "tokenizer_config.json", settings)
    return kept, rows


def main() -> None:
    """Writes the trimmed model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=16384, help="how many are left")
    options = parser.parse_args()
    try:
        kept, rows = trim(options.source, options.output, options.tokens)
    except UserError as error:
        parser.exit(2, f"trim: {error}\n")
    print(f"{options.output}: {options.source} with {len(kept)} of {rows} rows")


if __name__ == "__main__":
    main()
