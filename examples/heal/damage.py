"""Damages a language model: leaves some of its decoder layers out, so that there is something to heal.

    python -m examples.heal.damage SOURCE OUTPUT [--drop 10,14,18 | --count 3 --seed 0]

SOURCE: a directory or a hub name of a model whose layers are a list, as in Llama, Qwen or Mistral. OUTPUT gets a Hugging
Face directory with the weights in the dtype of the source, a config.json that fits them, and the source's tokenizer.
"""

import argparse
import random
import shutil
from pathlib import Path
from typing import Any

from actors.data.models import find_model, load_config
from actors.errors import UserError

COPIED = ("*.jinja", "generation_config.json", "merges.txt", "special_tokens_map.json", "tokenizer*", "vocab*")
"""Files beside config and weights: the tokenizer's, and what ends a response."""


def drawn(layers: int, count: int, seed: int) -> list[int]:
    """`count` of the inner layers, ascending. The first two and the last two stay: a model without them writes noise."""
    inner = range(2, layers - 2)
    if not 1 <= count <= len(inner):
        raise UserError("--count", count, f"1 to {len(inner)}, the layers between the first two and the last two")
    return sorted(random.Random(f"{seed}/damage").sample(inner, count))


def chosen(text: str, layers: int) -> list[int]:
    """The layers in a text such as `10,14,18`, ascending, each once. UserError: it names none, all, or what is no layer."""
    parts = [part.strip() for part in text.split(",")]
    found = sorted({int(part) for part in parts if part.isdecimal()})
    if len(found) != len(parts) or found[-1] >= layers or len(found) == layers:
        raise UserError("--drop", text, f"different numbers from 0 to {layers - 1}, with commas, and not all of them")
    return found


def damaged(source: Path, dropped: list[int]) -> Any:
    """The model (transformers) without these layers, in the dtype of its files; its config describes what is left."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto", use_safetensors=True)
    body, config = model.base_model, model.config
    layers = getattr(body, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or len(layers) != config.num_hidden_layers:
        raise UserError("SOURCE", f"a {config.model_type} model", "one whose layers are the list `model.layers`")
    kept = [place for place in range(len(layers)) if place not in dropped]
    body.layers = torch.nn.ModuleList(layers[place] for place in kept)
    # Some architectures list a property of every layer, for example its kind of attention.
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, name, [value[place] for place in kept])
    config.num_hidden_layers = len(kept)
    return model


def main() -> None:
    """Writes the damaged model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output", type=Path)
    parser.add_argument("--drop", help="the layers to leave out, counted from 0")
    parser.add_argument("--count", type=int, default=3, help="without --drop: how many inner layers to draw")
    parser.add_argument("--seed", type=int, default=0, help="without --drop: which are drawn")
    options = parser.parse_args()
    try:
        dropped = damage(options.source, options.output, options.drop, options.count, options.seed)
    except UserError as error:
        parser.exit(2, f"damage: {error}\n")
    print(f"{options.output}: {options.source} without the layers {', '.join(map(str, dropped))}")


def damage(source: str, output: Path, drop: str | None, count: int = 3, seed: int = 0) -> list[int]:
    """Writes SOURCE without some layers to `output`, and returns which. UserError: `output` is there, or see above."""
    output = output.expanduser()
    if output.exists():
        raise UserError("OUTPUT", output, "a directory that does not exist yet")
    path = find_model(source, "SOURCE")
    layers = load_config(str(path), False, "SOURCE").num_hidden_layers
    dropped = drawn(layers, count, seed) if drop is None else chosen(drop, layers)
    damaged(path, dropped).save_pretrained(output)
    for pattern in COPIED:
        for file in path.glob(pattern):
            shutil.copyfile(file, output / file.name)
    return dropped


if __name__ == "__main__":
    main()
