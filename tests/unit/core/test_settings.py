from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest
import yaml

from core.errors import ConfigError
from core.loading import describe, load_settings, update_section
from ops.cli.context import _assignment


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "ratchet.yaml"
    file.write_text("serve: {host: 0.0.0.0, port: 1111, queue: 7, max_batch: 3}\nhome: /tmp/x\n")
    settings = load_settings(file, {"serve.port": 3333}, {"RATCHET_SERVE__PORT": "2222", "RATCHET_SERVE__QUEUE": "8"})
    assert (settings.serve.port, settings.serve.queue, settings.serve.max_batch) == (3333, 8, 3)
    origins = {name: origin for name, _, origin, _ in describe(settings)}
    assert origins["serve.port"] == "flag"
    assert origins["serve.queue"] == "environment RATCHET_SERVE__QUEUE"
    assert origins["serve.max_batch"] == str(file)
    assert origins["kafka.topic"] == "default"
    assert settings.serve.url == "http://127.0.0.1:3333", "which its own machine can open"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("serve: {prt: 1}", ["serve.prt", "serve.port"]),
        ("serv: {port: 1}", ["serv"]),
        ("serve: {port: 99999999}", ["serve.port", "99999999", "ratchet.yaml"]),
        ("budget: {gflops_per_day: -1}", ["budget.gflops_per_day", "-1"]),
        ("- a list", ["mapping"]),
        ("serve: {port: [", ["YAML"]),
    ],
)
def test_a_wrong_key_or_value_names_itself_and_the_fix(tmp_path: Path, text: str, names: list[str]) -> None:
    file = tmp_path / "ratchet.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(file, environ={})
    for name in names:
        assert name in str(caught.value)
    assert caught.value.fix
    with pytest.raises(ConfigError, match=r"serve\.port"):
        load_settings(environ={"RATCHET_SERVE__PRT": "1"})


def test_variables_of_other_programs_are_named_in_a_warning_and_those_of_kubernetes_are_passed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    theirs = {
        "RATCHET_CONSOLE_SERVICE_HOST": "10.0.0.7", "RATCHET_SERVE_SERVICE_PORT": "8000",
        "RATCHET_SERVE_SERVICE_PORT_HTTP": "8000", "RATCHET_SERVE_PORT": "tcp://10.0.0.7:8000",
        "RATCHET_SERVE_PORT_8000_TCP": "tcp://10.0.0.7:8000", "RATCHET_SERVE_PORT_8000_TCP_ADDR": "10.0.0.7",
        "RATCHET_SERVICE_HOST": "10.0.0.7", "RATCHET_CLIENT_URL": "http://far:8000", "RATCHET_CLIENT_KEY": "rk_1",
    }  # fmt: skip
    assert load_settings(environ=theirs).origins == {} and not caplog.messages
    assert load_settings(environ={"RATCHET_URL": "x", "RATCHET_SERVE_PORT": "9000"}).serve.port == 8000
    assert "RATCHET_URL names no setting" in caplog.messages[0]
    assert "RATCHET_SERVE_PORT names no setting" in caplog.messages[1] and "'serve.port'" in caplog.messages[1]


def test_a_missing_settings_file_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_settings(tmp_path / "none.yaml")


def test_the_environment_can_name_the_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "mounted.yaml"
    file.write_text("metrics_host: 0.0.0.0")
    settings = load_settings(environ={"RATCHET_CONFIG": str(file)})
    assert (settings.metrics_host, settings.origins["metrics_host"]) == ("0.0.0.0", str(file))
    with pytest.raises(ConfigError, match="RATCHET_CONFIG"):
        load_settings(environ={"RATCHET_CONFIG": str(tmp_path / "none.yaml")})


def test_secrets_are_masked(tmp_path: Path) -> None:
    settings = load_settings(
        overrides={"serve.operator_key": "hunter2", "kafka.client": {"sasl_plain_password": "hunter2"}}, environ={}
    )
    assert "hunter2" not in str(describe(settings))
    assert settings.operator_key().get_secret_value() == "hunter2"
    assert load_settings(environ={"RATCHET_SERVE__OPERATOR_KEY": ""}).serve.operator_key is None


def test_the_operator_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    settings = load_settings(overrides={"home": tmp_path / "home"}, environ={})
    keys: set[str] = set()
    threads = [threading.Thread(target=lambda: keys.add(settings.operator_key().get_secret_value())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 1
    assert len(keys.pop()) >= 32
    assert stat.S_IMODE((tmp_path / "home" / "operator.key").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [
        ("base.vlm", "", ""), ("base.vlm", '""', ""), ("base.vlm", "no", "no"), ("base.clip", "123", "123"),
        ("base.clip", "a: b: c", "a: b: c"), ("serve.port", "9000", 9000), ("console.public", "true", True),
        ("console.public", "no", False), ("serve.image_hosts", "[a.example.org]", ["a.example.org"]),
        ("ledger_url", "null", None), ("ledger_url", "", None), ("rollout.share", "1e-1", 0.1),
    ],
)  # fmt: skip
def test_a_flag_and_a_variable_take_a_value_as_it_is_written(setting: str, text: str, value: object) -> None:
    variable = f"RATCHET_{setting.upper().replace('.', '__')}"
    flag = dict([_assignment(f"{setting}={text}")])
    for settings in (load_settings(overrides=flag, environ={}), load_settings(environ={variable: text})):
        shown = {name: each for name, each, _, _ in describe(settings)}[setting]
        assert (shown if value is None or not isinstance(value, list) else [str(each) for each in shown]) == value


def test_one_option_of_the_kafka_client_can_be_set_beside_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "ratchet.yaml"
    file.write_text("kafka: {client: {security_protocol: SASL_SSL, ssl_cafile: old.pem}}")
    flag = dict([_assignment("kafka.client.ssl_cafile=new.pem")])
    variable = {"RATCHET_KAFKA__CLIENT__SASL_PLAIN_PASSWORD": "0123"}
    settings = load_settings(file, overrides=flag, environ=variable)
    assert settings.kafka.client == {
        "security_protocol": "SASL_SSL", "ssl_cafile": "new.pem", "sasl_plain_password": "0123",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="kafka"):
        load_settings(overrides={"kafka.group.x": "y"}, environ={})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:hunter2@db:5432/r", "postgresql://me:**********@db:5432/r"),
        ("postgresql://me:hun@ter2@db/r", "postgresql://me:**********@db/r"),
        ("postgresql://db/r?user=me&password=hunter2&sslmode=require", "postgresql://db/r?user=me&password=**********&sslmode=require"),
        ("postgresql://me@db/r", "postgresql://me@db/r"),
        ("sqlite:////var/lib/ledger.db", "sqlite:////var/lib/ledger.db"),
    ],
)  # fmt: skip
def test_passwords_in_urls_are_not_shown(url: str, shown: str) -> None:
    settings = load_settings(overrides={"ledger_url": url, "artifacts_url": url, "lake_url": url}, environ={})
    rows = {name: value for name, value, _, _ in describe(settings)}
    assert [rows[name] for name in ("ledger_url", "artifacts_url", "lake_url")] == [shown] * 3
    assert settings.ledger == url


WRITTEN = """\
# of the shop
home: /data   # a volume

serve:
  port: 9000  # behind the proxy
  max_batch: 16

kafka:
  topic: pictures
"""


def test_a_file_and_a_section_that_are_not_there_are_made(tmp_path: Path) -> None:
    path = tmp_path / "ratchet.yaml"
    assert update_section(path, "serve", {"precision": "int8", "max_batch": 8}) == {}
    update_section(path, "kafka", {"topic": "pictures"})
    assert yaml.safe_load(path.read_text()) == {
        "serve": {"precision": "int8", "max_batch": 8}, "kafka": {"topic": "pictures"},
    }  # fmt: skip


def test_values_are_replaced_and_added_and_comments_stay(tmp_path: Path) -> None:
    path = tmp_path / "ratchet.yaml"
    path.write_text(WRITTEN)
    path.chmod(0o600)
    assert update_section(path, "serve", {"max_batch": 32, "precision": "bfloat16"}) == {"max_batch": 16}
    text = path.read_text()
    assert "# of the shop" in text and "port: 9000  # behind the proxy" in text
    assert yaml.safe_load(text) == {
        "home": "/data", "serve": {"port": 9000, "max_batch": 32, "precision": "bfloat16"},
        "kafka": {"topic": "pictures"},
    }  # fmt: skip
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["ratchet.yaml"]


@pytest.mark.parametrize("text", ["serve: {port: 9000}\n", "{serve: {port: 1}}\n", "- a list\n", "serve: [\n"])
def test_a_file_that_cannot_be_edited_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ratchet.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        update_section(path, "serve", {"precision": "int8"})
    assert path.read_text() == text
