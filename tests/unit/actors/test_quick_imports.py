"""Large imports run without the garbage collector, and leave it as it was."""

import gc
import subprocess
import sys

import pytest

from actors.data import models
from actors.quick_imports import quick_imports


def test_the_collector_pauses_within_the_block_and_is_then_as_it_was() -> None:
    with pytest.raises(ImportError), quick_imports():
        with quick_imports():
            pass
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_code_of_a_model_is_imported_without_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    of, seen = AutoModelForCausalLM.from_config, []
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_config", lambda *a, **k: (seen.append(gc.isenabled()), of(*a, **k))[1]
    )
    assert models.expected_tensors("examples/addition/student", False, "student.model")
    assert seen == [False] and gc.isenabled()


def test_a_campaign_and_a_check_import_without_the_collector() -> None:
    program = (
        "import gc, sys, cluster.cli as cli\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == sys.argv[2]:\n"
        "            print(gc.isenabled())\n"
        "            raise SystemExit\n"
        "sys.meta_path.insert(0, Finder())\n"
        "cli.main([sys.argv[1], 'configs/quickstart.yaml'])\n"
    )
    for command, module in (("run", "cluster.run"), ("check", "cluster.preflight")):
        done = subprocess.run([sys.executable, "-c", program, command, module], capture_output=True, text=True)
        assert "False" in done.stdout.splitlines(), done.stdout + done.stderr
