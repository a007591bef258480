"""The demo runs where its usual ports are taken."""

from __future__ import annotations

import socket
from pathlib import Path

from core.settings import Settings
from demo.story.story import _free_ports, _settle


def test_a_taken_port_is_replaced_by_a_free_one_and_none_is_given_out_twice() -> None:
    usual = Settings()
    with socket.create_server(("127.0.0.1", 0)) as first:
        held = first.getsockname()[1]
        assert usual.serve.port + 1 == usual.console.port  # so that a server that gives way would meet the console
        serve, console = _free_ports(f"127.0.0.1:{held}", f"127.0.0.1:{held + 1}")
    assert serve != f"127.0.0.1:{held}" and serve != console


def test_the_demo_writes_the_ports_it_found_into_its_settings(tmp_path: Path) -> None:
    settings = _settle(tmp_path, with_vlm=False).settings
    ports = {settings.serve.port, settings.console.port, int(settings.kafka.bootstrap.rpartition(":")[2])}
    assert len(ports) == 3
