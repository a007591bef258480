"""Make a release: ``make release VERSION=0.2.0``. It commits, builds and tags, and uploads nothing.

The version stands in pyproject.toml of each distribution, in the pin of one to the other, and in the chart; this writes
all of them. What is built is the commit, not the tree around it. If anything fails, the commit is taken back.
"""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent
UV = Path(sysconfig.get_path("scripts")) / "uv"
PLACES = ("pyproject.toml", "*/pyproject.toml", "helm/*/Chart.yaml")
STATED = re.compile(r'(?m)^(version = "|version: |appVersion: "| *"ratchet-(?:client|methods)==)(\d+\.\d+\.\d+)')
UNRELEASED = re.compile(r"(?ms)^## Unreleased[^\n]*\n(.*?)(?=^## |\Z)")


def run(*command: str | Path, cwd: Path = ROOT) -> bytes:
    """What a command prints; ends this program with its complaint if it fails."""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed")
    return done.stdout


def stated(root: Path = ROOT) -> dict[str, list[str]]:
    """Every version of ours that a file states, by file."""
    files = sorted(path for pattern in PLACES for path in root.glob(pattern))
    return {str(path.relative_to(root)): [found[2] for found in STATED.finditer(path.read_text())] for path in files}


def move_unreleased(changelog: str, version: str, day: datetime.date) -> str:
    """The changelog with its section Unreleased under the version; ends this program if there is nothing in it."""
    section = UNRELEASED.search(changelog)
    if section is None or not section[1].strip():
        sys.exit("CHANGELOG.md says nothing under '## Unreleased'.")
    body = f"## Unreleased\n\n## {version} ({day.isoformat()})\n\n{section[1].lstrip()}"
    return changelog[: section.start()] + body + changelog[section.end() :]


def check(version: str) -> None:
    """End this program if the version cannot be released from this tree."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        sys.exit(f"{version!r} is no version: give three numbers, such as 0.2.0.")
    (now,) = {each for found in stated().values() for each in found}
    if tuple(map(int, version.split("."))) < tuple(map(int, now.split("."))):
        sys.exit(f"{version} is older than {now}.")
    if run("git", "tag", "--list", f"v{version}"):
        sys.exit(f"v{version} is there already.")
    if changed := run("git", "status", "--porcelain").decode():
        sys.exit(f"Commit or remove first:\n{changed}")


def build(version: str) -> list[Path]:
    """Build wheel and source distribution of each project from the last commit, and check their metadata."""
    target = ROOT / "dist" / version
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        commit = Path(folder, "commit.tar")
        commit.write_bytes(run("git", "archive", "HEAD"))
        tree = Path(folder, "tree")
        shutil.unpack_archive(commit, tree)
        for place in stated(tree):
            if place.endswith("pyproject.toml"):
                run(UV, "build", "--quiet", "--out-dir", target, cwd=(tree / place).parent)
    built = sorted(path for path in target.iterdir() if path.name.endswith((".whl", ".tar.gz")))
    if wrong := [path.name for path in built if f"-{version}" not in path.name]:
        sys.exit(f"Not of {version}: {', '.join(wrong)}")
    print(run(UV, "tool", "run", "twine", "check", "--strict", *built).decode(), end="")
    return built


def main(version: str) -> None:
    """Release this version."""
    check(version)
    before = run("git", "rev-parse", "HEAD").decode().strip()
    try:
        for name in stated():
            (ROOT / name).write_text(STATED.sub(rf"\g<1>{version}", (ROOT / name).read_text()))
        log = ROOT / "CHANGELOG.md"
        log.write_text(move_unreleased(log.read_text(), version, datetime.datetime.now(datetime.UTC).date()))
        run("git", "commit", "--quiet", "--all", "--message", f"Ratchet {version}")
        built = build(version)
        run("git", "tag", "--annotate", f"v{version}", "--message", f"Ratchet {version}")
    except BaseException:
        run("git", "reset", "--quiet", "--hard", before)  # nothing is lost: the tree was clean
        raise
    print(f"\nReleased {version} here. To publish it:\n\n  git push origin HEAD v{version}")
    print(f"  uv publish {' '.join(str(path.relative_to(ROOT)) for path in built)}")
    for target in ("cpu", "gpu", "slim"):
        print(f"  docker build --target {target} -t ratchet:{version}-{target} .")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make release VERSION=0.2.0")
    main(sys.argv[1])
