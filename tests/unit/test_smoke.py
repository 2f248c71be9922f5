"""The smoke test for one card runs on a CPU without any package but torch and transformers, and finds what is wrong."""

import argparse
import json
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from actors.forward import packing
from benchmarks.gpu.smoke import attention, runner
from benchmarks.gpu.smoke.report import Found, figure_table, missed, page
from benchmarks.gpu.smoke.runner import PARTS, Part

ROOT = Path(__file__).resolve().parents[2]
ABSENT = (
    "ray",
    "vllm",
    "omegaconf",
    "numba",
    "xxhash",
    "peft",
    "pandas",
    "datasets",
    "pyarrow",
    "tensorboardX",
    "pytest",
)
"""Some of what a machine with a card, torch and transformers lacks."""


def needed(*names: str) -> set[str]:
    """The distributions that these need, themselves included."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # the builds for GPUs name more than those for CPUs have
            continue
        if name not in found:
            found.add(name)
            wanted = [Requirement(text) for text in requires]
            waiting += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has torch, transformers and what they need, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    for name in needed("torch", "transformers"):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            target = Path(str(distribution.locate_file(top)))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
    return folder / "bin" / "python"


def run(python: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([python, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_every_part_runs_with_torch_and_transformers_alone(bare: Path, tmp_path: Path) -> None:
    search = f"from importlib.util import find_spec; print([n for n in {ABSENT} if find_spec(n)])"
    assert run(bare, tmp_path, "-c", search).stdout == "[]\n"
    words = ["-m", "benchmarks.gpu", "smoke", "--device", "cpu", "--shape", "tiny", "--out", "found"]
    done = run(bare, tmp_path, *words, "--parts", *(name for name in PARTS if name != "compiled"))
    found = json.loads((tmp_path / "found" / "smoke.json").read_text())["parts"]
    assert {part["part"]: (part["verdict"], part["reason"]) for part in found} == {
        name: ("ok", "") for name in PARTS if name not in ("compiled", "update-0.6b")
    }, done.stdout + done.stderr + (tmp_path / "found" / "smoke.log").read_text()[-3000:]
    assert done.returncode == 0, done.stderr
    assert all(len(part["figures"]) + len(part["checks"]) > 2 for part in found)
    assert any("xxhash" in note for part in found for note in part["notes"])
    assert "| ranks | ok |" in (tmp_path / "found" / "smoke.md").read_text()


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    ends = ("good", "wrong", "raises", "full", "dies", "hangs", "good again")
    made = {name: Part(f"tests.smoke_parts:{name.split()[0]}", 2 if name == "hangs" else 60, 1) for name in ends}
    monkeypatch.setattr(runner, "PARTS", made)
    monkeypatch.chdir(ROOT)
    yield tmp_path / "out"


def test_a_part_that_fails_in_any_way_leaves_the_others_their_verdicts(parts: Path, capsys: Any) -> None:
    assert runner.main(["--device", "cpu", "--out", str(parts)]) == 1
    found = {part["part"]: part for part in json.loads((parts / "smoke.json").read_text())["parts"]}
    assert {name: part["verdict"] for name, part in found.items()} == {
        "good": "ok",
        "wrong": "wrong",
        "raises": "failed",
        "full": "out of memory",
        "dies": "failed",
        "hangs": "too late",
        "good again": "ok",
    }
    assert "ValueError: a wall" in found["raises"]["reason"] and "signal 11" in found["dies"]["reason"]
    assert found["wrong"]["reason"].startswith("distance: 0.03") and "no number" in found["wrong"]["reason"]
    # What a part had found before it ended is there.
    assert all(part["figures"][-1]["figure"] == "speed" for name, part in found.items() if name != "full")
    assert "hangs: too late" in capsys.readouterr().out
    assert runner.main(["--device", "cpu", "--out", str(parts), "--parts", "good", "good again"]) == 0


def test_what_the_clock_does_not_allow_is_said(parts: Path) -> None:
    assert runner.main(["--device", "cpu", "--out", str(parts), "--seconds", "0.5"]) == 1
    found = json.loads((parts / "smoke.json").read_text())["parts"]
    assert {part["verdict"] for part in found} == {"not run"} and "it needs 1" in found[0]["reason"]


def test_all_parts_fit_into_ten_minutes_and_those_at_risk_come_first() -> None:
    assert runner.SECONDS < 540
    assert list(PARTS)[:3] == ["attention", "ranks", "loop"] and list(PARTS)[-1] == "compiled"
    assert sum(part.needs for part in PARTS.values()) < runner.SECONDS


def leak(module: Any, query: Any, key: Any, value: Any, mask: Any, row: Any, **how: Any) -> Any:
    """Attention over the whole row, as one sequence."""
    whole = packing.Packing(((1, query.shape[2]),), row.offsets, query.shape[2])
    return REAL(module, query, key, value, mask, whole, **how)


def one_too_many(module: Any, *arguments: Any, sliding_window: int | None, **how: Any) -> Any:
    return REAL(module, *arguments, sliding_window=sliding_window and sliding_window + 1, **how)


def other_heads(module: Any, query: Any, key: Any, value: Any, *arguments: Any, **how: Any) -> Any:
    return REAL(module, query, key.flip(1), value.flip(1), *arguments, **how)


REAL = packing._attend


@pytest.mark.parametrize(
    ("broken", "case"),
    [(leak, "equal heads"), (one_too_many, "a window of 128"), (other_heads, "grouped heads, as Qwen3-4B")],
)
def test_attention_that_is_wrong_is_found(broken: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = attention.small(attention.CASES[case])
    limit = attention.LIMITS[torch.bfloat16][1]
    assert max(attention.compare(small, torch.bfloat16, "cpu").values()) < limit
    monkeypatch.setattr(packing, "_attend", broken)
    assert max(attention.compare(small, torch.bfloat16, "cpu").values()) > 2 * limit


def test_the_reference_is_what_torch_computes_for_a_single_sequence() -> None:
    q, k, v = (torch.randn(heads, 33, 8, dtype=torch.float64) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention.alone(q, k, v, None), expected.transpose(0, 1))


def test_a_target_that_is_missed_is_marked_and_is_no_error() -> None:
    figures = [{"figure": "MFU", "value": 0.3, "unit": "", "target": ">= 0.35"},
               {"figure": "memory", "value": 1.2, "unit": "GB", "target": "<= 1.5"},
               {"figure": "peak", "value": None, "unit": "", "target": ">= 1"}]  # fmt: skip
    assert [missed(figure) for figure in figures] == [True, False, False]
    part = Found("update", "ok", figures=figures, machine={"card": "a card"})
    assert "0.3  | >= 0.35 (missed) |" in figure_table([part]) and "a card" in page([part], "today")


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('{"figure": "speed", "value": 1, "unit": "", "target": ""}\n{"fig')
    found = Found.read("part", tmp_path / "lines", 1.0, ("failed", "killed by signal 9"))
    assert len(found.figures) == 1 and found.verdict == "failed"


def test_the_stand_in_for_checksums_tells_bytes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.smoke import standins

    monkeypatch.delitem(sys.modules, "xxhash", raising=False)
    monkeypatch.setattr(standins, "find_spec", lambda _: None)
    assert standins.fill_in() == ["xxhash"]
    stand_in: Any = sys.modules.pop("xxhash")
    assert stand_in.xxh3_64_intdigest(b"ab") == int(stand_in.xxh3_64_hexdigest(b"ab"), 16)
    digest = stand_in.xxh3_64(b"a")
    digest.update(b"b")
    assert digest.intdigest() == stand_in.xxh3_64_intdigest(b"ab") != stand_in.xxh3_64_intdigest(b"ac")


def test_the_options_of_a_part_are_its_shape_or_the_one_of_all() -> None:
    options: argparse.Namespace = runner.arguments(["--parts", "attention", "copies"])
    assert options.parts == ["attention", "copies"] and options.shape is None and options.device == "cuda"
