from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core import request_context
from core.child_process import tail
from core.log_format import MAX_MESSAGE_CHARS, MAX_TRACEBACK_CHARS, JsonFormatter, Redactor, TextFormatter
from core.logs import secrets_of
from core.settings import Settings

PROGRAM = """
import logging, sys
from core.logs import configure_logging
from core.progress import progress_log
from core.settings import Settings
configure_logging()
settings = Settings(logs=dict(part.split("=") for part in sys.argv[1:]))
configure_logging(settings, "catalog", replica="x1")
configure_logging(settings, "catalog", replica="x1")
logging.getLogger("ratchet.catalog").warning("the store is %s", "away")
logging.getLogger("ratchet.catalog").info("a fine day")
logging.getLogger("streams.ingest.consumer").debug("details")
logging.getLogger("httpx").info("GET https://elsewhere")
for port in range(50):
    logging.getLogger("kafka.net.manager").error("Connection failed: port %d", port)
progress_log.info("a [long] line " + "and more " * 30 + "end")
progress_log.warning("slow [x")
progress_log.error("broken")
"""


def run(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_where_no_terminal_is_each_record_is_one_line_of_json_with_date_level_logger_and_role() -> None:
    records = [json.loads(line) for line in run()]
    assert [(each["level"], each["message"][:16]) for each in records] == [
        ("WARNING", "the store is awa"), ("INFO", "a fine day"), ("ERROR", "Connection faile"),
        ("INFO", "a [long] line an"), ("WARNING", "slow [x"), ("ERROR", "broken"),
    ]  # fmt: skip
    assert records[3]["message"].endswith("end")
    first = records[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first.pop("pid")
    assert first == {
        "level": "WARNING", "logger": "ratchet.catalog", "message": "the store is away", "role": "catalog",
        "replica": "x1",
    }  # fmt: skip


def test_text_is_one_line_for_each_record_however_long_and_levels_are_of_our_own_loggers() -> None:
    lines = run("format=text", "level=debug")
    assert len(lines) == 7
    assert re.fullmatch(r"\S+Z WARNING ratchet\.catalog: the store is away \[replica=x1\]", lines[0])
    assert "details" in lines[2]
    assert len(lines[4]) > 250
    assert [line.split()[1] for line in run("format=text", "level=error")] == ["ERROR", "ERROR"]


def test_a_terminal_has_text_and_no_date_before_progress() -> None:
    leader, follower = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", PROGRAM], stderr=follower, check=True)
    finally:
        os.close(follower)
    with os.fdopen(leader, "rb", buffering=0) as screen:
        shown = screen.read(100_000).decode()
    assert re.search(r"^\S+Z WARNING ratchet\.catalog: the store is away", shown)
    assert re.search(r"\d\d:\d\d:\d\d(\x1b\[0m)? broken|\x1b\[31mbroken", shown)


def test_a_process_that_is_spawned_logs_as_its_parent_does() -> None:
    program = (
        "import logging\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from core.logs import configure_logging, inherit, inherited\n"
        "configure_logging(role='ingest')\n"
        "with ProcessPoolExecutor(1, get_context('spawn'), inherit, (inherited(),)) as pool:\n"
        "    pool.submit(logging.getLogger('streams.x').info, 'from a child').result()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    fields = json.loads(done.stderr)
    assert (fields["message"], fields["role"], fields["logger"]) == ("from a child", "ingest", "streams.x")


def test_lines_of_the_kafka_client_are_those_of_services_alone() -> None:
    program = (
        "import logging\n"
        "from core.logs import configure_logging\n"
        "from core.settings import Settings\n"
        "configure_logging(service=False)\n"
        "logging.getLogger('kafka.net').error('of a command')\n"
        "configure_logging(Settings(), 'ingest')\n"
        "logging.getLogger('kafka.net').error('of a service')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == ["of a service"]


def record(message: str, *arguments: object, error: bool = False) -> logging.LogRecord:
    info: Any = None
    if error:
        try:
            raise ValueError(message)
        except ValueError:
            info = sys.exc_info()
    return logging.LogRecord("ratchet.x", logging.ERROR, __file__, 1, message, arguments, info)


def test_a_line_is_of_the_request_that_it_was_written_for() -> None:
    formatter = JsonFormatter({"role": "encoder"}, request_id=lambda: "of-ray")
    assert json.loads(formatter.format(record("a")))["request_id"] == "of-ray"
    token = request_context.begin("r1")
    request_context.note("clip-a", 7)
    try:
        fields = json.loads(formatter.format(record("a")))
        text = TextFormatter({"role": "encoder"}).format(record("a"))
        outside = request_context.detached().run(JsonFormatter({}).format, record("a"))
    finally:
        request_context.end(token)
    assert (fields["request_id"], fields["release"], fields["adapter"]) == ("r1", 7, "clip-a")
    assert text.endswith("a [request_id=r1 release=7 adapter=clip-a]")
    assert "request_id" not in json.loads(outside)

    def line() -> str:
        request_context.note("base")
        return formatter.format(record("a"))

    fields = json.loads(request_context.detached().run(line))
    assert (fields["request_id"], fields["adapter"]) == ("of-ray", "base"), "a replica knows its adapter, Ray the id"


def test_lines_are_bounded_and_of_a_traceback_the_end_is_kept() -> None:
    line = JsonFormatter({}).format(record("x" * 100_000, error=True))
    assert len(line) < MAX_MESSAGE_CHARS + MAX_TRACEBACK_CHARS + 300
    assert json.loads(line)["traceback"].endswith("xxx")
    assert "\n" not in JsonFormatter({}).format(record("one\ntwo"))


@pytest.mark.parametrize(
    "text",
    [
        "cannot connect to postgresql://ann:hunter2hunter@db:5432/ratchet",
        "GET https://bucket.example/a?X-Amz-Signature=hunter2hunter&b=1",
        "headers: {'authorization': 'Bearer hunter2hunter'}",
        "the key rk_0a1b2c3d_hunter2hunter was sent",
        "sasl_plain_password='hunter2hunter', sasl_mechanism=PLAIN",
        '{"client_secret": "hunter2hunter"}',
        "given: hunter2hunter",
    ],
)
@pytest.mark.parametrize("formatter", [JsonFormatter, TextFormatter])
def test_secrets_are_taken_out_of_every_line(text: str, formatter: type[JsonFormatter] | type[TextFormatter]) -> None:
    redactor = Redactor(["hunter2hunter"] if "given" in text else [])
    for each in (record("%s", text), record(text, error=True)):
        line = formatter({}, redactor).format(each)
        assert "hunter2" not in line
        assert "****" in line
    text = "release 3 at http://127.0.0.1:8000/v1: 12 tokens, max_tokens=128, key 'ann' of rk_0a1b2c3d, the key: value"
    assert Redactor().redact(text) == text, "no secret"


def test_the_secrets_of_a_process_are_those_of_its_settings_its_environment_and_its_key_file(tmp_path: Path) -> None:
    settings = Settings(
        home=tmp_path, kafka={"client": {"sasl_plain_password": "of-kafka", "security_protocol": "SASL_SSL"},
        "oauth": {"client_secret": "of-oauth"}}, ingest={"split_key": "of-split"},
    )  # fmt: skip
    (tmp_path / "operator.key").write_text("of-operator\n")
    environ = {"AWS_SECRET_ACCESS_KEY": "of-aws", "PATH": "/bin"}
    expected = {"of-kafka", "of-oauth", "of-split", "of-operator", "of-aws"}
    assert set(secrets_of(settings, environ)) == expected
    set_key = settings.model_copy(update={"serve": settings.serve.model_validate({"operator_key": "set-key"})})
    assert set(secrets_of(set_key, {})) == expected - {"of-operator", "of-aws"} | {"set-key"}


def test_the_end_of_a_parts_log_is_shown_as_text(tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    formatter = JsonFormatter({"role": "serve"})
    log.write_text(f"Ray's own line\n{formatter.format(record('the port is taken'))}\n")
    first, second = tail(log).splitlines()
    assert first == "Ray's own line"
    assert re.fullmatch(r"\S+Z ERROR the port is taken", second)
