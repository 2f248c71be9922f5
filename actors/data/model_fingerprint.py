"""The fingerprint of a model: xxh3-128 of its contents, whatever the path is.

Small files are hashed as a whole. Of each safetensors file it is the header, the size and SAMPLES pieces at equal
distances, so that a model of 140 GB takes a second: training changes every tensor, and another model has another header.
"""

from pathlib import Path

import xxhash

SMALL = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
"""Files that say how a model is built and how it reads. Others (README, licence) do not count."""
SAMPLES, SAMPLE_BYTES = 64, 4096
WHOLE_BYTES = 1 << 20
"""Files up to this size are hashed as a whole."""


def model_fingerprint(directory: Path) -> str:
    """Of the files of a model, or of a tokenizer, that are in the directory itself."""
    digest = xxhash.xxh3_128()
    for path in sorted(directory.iterdir()):
        if path.suffix in (*SMALL, ".safetensors") and not path.name.startswith(".") and path.is_file():
            digest.update(path.name.encode() + b"\0")
            _add(digest, path)
    return digest.hexdigest()


def _add(digest: xxhash.xxh3_128, path: Path) -> None:
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size <= WHOLE_BYTES or path.suffix != ".safetensors":
            while data := file.read(WHOLE_BYTES):
                digest.update(data)
            return
        header = file.read(8)
        digest.update(header + file.read(min(int.from_bytes(header, "little"), size)))
        for sample in range(SAMPLES):
            file.seek(sample * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
