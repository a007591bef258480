"""Apache Kafka on this machine: one KRaft node, from Maven Central (43 MB, once). A start takes 5 to 15 seconds."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from core.addresses import free_port
from core.child_process import stop_reaped
from tests.support.downloads import from_maven, launched

VERSION: Final = "4.4.0"
START_SECONDS: Final = 120.0
CLUSTER: Final = "MkU3OEVBNTcwNTJENDM2Qg"
POM: Final = """<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
<groupId>local</groupId><artifactId>broker</artifactId><version>1</version><packaging>pom</packaging><dependencies>
<dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{version}</version></dependency>
<dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version></dependency>
</dependencies></project>
"""
"""Without slf4j-simple nothing is logged."""
PROPERTIES: Final = """
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
controller.listener.names=CONTROLLER
log.dirs={data}
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
group.initial.rebalance.delay.ms=0
log.cleaner.backoff.ms=200
log.retention.ms=-1
"""
"""For one node: few internal partitions, and no delays, which cost tests seconds. No retention by age, because tests
send records of other years."""
ACLS: Final = """
listeners=PLAINTEXT://127.0.0.1:{port},SASL_PLAINTEXT://{sasl},CONTROLLER://127.0.0.1:{controller}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_plaintext.plain.sasl.jaas.config=\
org.apache.kafka.common.security.plain.PlainLoginModule required {users};
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
"""
"""The last of two lines for one property wins in Kafka."""
JAVA: Final = ("java", "-Xms128m", "-Xmx768m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp")
"""Tests are over before the better compiler pays off."""


class ApacheKafka:
    """A broker that may be killed and started again. A context manager. Raises NotHere on construction, when Java or
    Maven is missing or Maven cannot download the jars.

    ``users``: names and passwords for SASL/PLAIN at :attr:`sasl_address`, with the rights that ACLs give. Clients of
    :attr:`address` may do everything.
    """

    def __init__(self, users: Mapping[str, str] | None = None) -> None:
        self._jars = jars()
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.sasl_address = f"127.0.0.1:{free_port()}"
        self.root = Path(tempfile.mkdtemp(prefix="ratchet-kafka-"))
        self.data = self.root / "data"
        self.log = self.root / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._properties = self.root / "server.properties"
        controller = free_port()
        settings = PROPERTIES.format(port=self.port, controller=controller, data=self.data)
        if users is not None:
            names = " ".join(f'user_{name}="{password}"' for name, password in users.items())
            settings += ACLS.format(port=self.port, controller=controller, sasl=self.sasl_address, users=names)
        self._properties.write_text(settings)
        form = ("format", "--standalone", "-t", CLUSTER, "-c", str(self._properties))
        words = [*JAVA, f"{self._jars}/*", "kafka.tools.StorageTool", *form]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        self.log.write_bytes(b"")
        command = [*JAVA, f"{self._jars}/*", "kafka.Kafka", str(self._properties)]
        self._process = launched(
            command, self.log, lambda: b"Kafka Server started" in self.log.read_bytes(), START_SECONDS
        )

    def stop(self, with_signal: signal.Signals = signal.SIGTERM) -> None:
        """End it in order, or by another signal; its topics are kept."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(with_signal)
            stop_reaped(process)

    def __enter__(self) -> ApacheKafka:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)
        shutil.rmtree(self.root)


def jars() -> Path:
    """The folder with Kafka's jars, which are downloaded once. Raises NotHere."""
    goal = ("dependency:copy-dependencies", "-DoutputDirectory=libs", "-DincludeScope=runtime")
    return from_maven(f"kafka-{VERSION}", "libs", *goal, pom=POM.format(version=VERSION))
