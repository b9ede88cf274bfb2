"""What the files of examples/deploy say agrees with one another, with the app, and with the page that shows them."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import uvicorn
import yaml
from tests.engines.process import Process, free_port
from tests.examples.deployed import EXAMPLE, is_ready, program_of

from streamkeep.http import StreamsHTTP

PAGE: Final = Path(__file__).parents[2] / "docs/how-to/deploy.md"
DRAIN_SECONDS: Final = 20
"""The app's `drain`, unless the environment says otherwise."""
END_SECONDS: Final = 4 + 5 + 5
"""What a shutdown may take beside it."""


LANGUAGES: Final = {
    "app.py": "py",
    "nginx.conf": "nginx",
    "Caddyfile": "caddyfile",
    "answers@.service": "ini",
    "Containerfile": "dockerfile",
}


def text_of(name: str) -> str:
    return (EXAMPLE / name).read_text()


def number_in(name: str, pattern: str) -> int:
    (found,) = re.findall(pattern, text_of(name))
    return int(found)


def documents() -> Mapping[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(text_of("kubernetes.yaml"))}


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = documents()["Deployment"]["spec"]["template"]["spec"]
    return spec


def test_each_who_stops_the_service_waits_longer_than_whom_it_stops() -> None:
    assert f'"DRAIN_SECONDS", "{DRAIN_SECONDS}"' in text_of("app.py")
    by_unit = number_in("answers@.service", r"--timeout-graceful-shutdown (\d+)")
    by_image = number_in("Containerfile", r'"--timeout-graceful-shutdown", "(\d+)"')
    assert by_unit == by_image > DRAIN_SECONDS + END_SECONDS
    assert number_in("answers@.service", r"TimeoutStopSec=(\d+)") > by_unit
    assert number_in("Containerfile", r"--stop-timeout (\d+)") > by_image
    waits_before = pod()["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod()["terminationGracePeriodSeconds"] > waits_before + by_image


@pytest.mark.parametrize(
    ("name", "pattern"), [("nginx.conf", r"proxy_read_timeout (\d+)s"), ("Caddyfile", r"READ_TIMEOUT:(\d+)s")]
)
def test_heartbeats_come_several_times_while_a_proxy_waits(name: str, pattern: str) -> None:
    heartbeat = number_in("app.py", r'"HEARTBEAT_SECONDS", "(\d+)"')
    assert number_in(name, pattern) >= 3 * heartbeat


def test_nginx_lets_bodies_through_that_the_app_takes() -> None:
    assert number_in("nginx.conf", r"client_max_body_size (\d+)m;") * 2**20 == StreamsHTTP("memory://").max_body_bytes


@pytest.mark.parametrize(
    ("name", "pattern"), [("nginx.conf", r"keepalive_timeout (\d+)s;"), ("Caddyfile", r"\tkeepalive (\d+)s\n")]
)
def test_a_proxy_closes_an_idle_connection_before_the_instance_does(name: str, pattern: str) -> None:
    """A POST on a connection that is being closed is lost, and no proxy sends it again."""
    by_default = uvicorn.Config("app:app").timeout_keep_alive
    assert all("--timeout-keep-alive" not in text_of(file) for file in ("answers@.service", "Containerfile"))
    assert number_in(name, pattern) < by_default


def test_probes_wait_longer_than_the_app_looks_at_its_storage() -> None:
    looks = number_in("app.py", r"anyio\.fail_after\((\d+)\)")
    (container,) = pod()["containers"]
    assert all(container[name]["timeoutSeconds"] > looks for name in ("startupProbe", "readinessProbe", "livenessProbe"))


def test_a_unit_that_cannot_start_yet_is_tried_for_ever_and_has_room_for_readers() -> None:
    assert "\nStartLimitIntervalSec=0\n" in text_of("answers@.service").partition("[Service]")[0]
    assert "\nRestart=always\n" in text_of("answers@.service")
    assert number_in("answers@.service", r"LimitNOFILE=(\d+)") > 10_000


def test_the_pod_is_what_the_restricted_standard_of_kubernetes_asks_for() -> None:
    (container,) = pod()["containers"]
    assert pod()["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert number_in("Containerfile", r"\nUSER (\d+)\n") > 0  # of a name Kubernetes cannot say whether it is root's


def test_the_port_of_a_container_is_open_to_the_proxy_only() -> None:
    (published,) = re.findall(r"--publish (\S+)", text_of("Containerfile"))
    assert published.startswith("127.0.0.1:")


def test_kubernetes_asks_what_the_app_answers_where_the_image_listens() -> None:
    kinds = documents()
    assert set(kinds) == {"Deployment", "Service", "PodDisruptionBudget"}
    (container,) = pod()["containers"]
    (port,) = container["ports"]
    assert f"EXPOSE {port['containerPort']}\n" in text_of("Containerfile")
    probes = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert (
        {probe["port"] for probe in probes.values()} == {port["name"]} == {kinds["Service"]["spec"]["ports"][0]["targetPort"]}
    )
    assert [probe["path"] for probe in probes.values()] == ["/readyz", "/readyz", "/livez"]
    assert all(f'@app.get("{probe["path"]}")' in text_of("app.py") for probe in probes.values())
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert kinds["Deployment"]["spec"]["selector"]["matchLabels"] == labels == kinds["Service"]["spec"]["selector"]
    assert kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert {variable["name"] for variable in container["env"]} <= set(
        re.findall(r'environ(?:\.get\(|\[)"(\w+)"', text_of("app.py"))
    )


def test_systemd_takes_the_unit(requires: Callable[[str], str], tmp_path: Path) -> None:
    """With programs that are there in place of those that it names, for systemd looks."""
    verify = [requires("systemd-analyze"), "verify", "--man=no"]
    unit = tmp_path / "answers@8001.service"
    program = tmp_path / "program"  # a path without blanks, as the unit's are
    program.symlink_to(sys.executable)
    there = text_of("answers@.service").replace("/srv/answers/.venv/bin/uvicorn", str(program))
    unit.write_text(there.replace("/usr/bin/curl", str(program)))
    said = subprocess.run([*verify, unit], check=False, capture_output=True, text=True, timeout=50)
    ours = [line for line in (said.stdout + said.stderr).splitlines() if "answers@" in line]
    assert (said.returncode, ours) == (0, [])
    unit.write_text(there.replace("TimeoutStopSec=45", "TimeoutStopSec=soon"))
    wrong = subprocess.run([*verify, unit], check=False, capture_output=True, text=True, timeout=50)
    assert "soon" in wrong.stdout + wrong.stderr


def test_caddy_takes_the_caddyfile_as_it_is_written() -> None:
    formatted = subprocess.run(
        [program_of("caddy"), "fmt", EXAMPLE / "Caddyfile"], check=True, capture_output=True, text=True, timeout=50
    )
    assert formatted.stdout == text_of("Caddyfile")


def test_what_the_image_runs_serves_what_is_copied_into_it(tmp_path: Path) -> None:
    """Without a container engine: its copies are made, and its command runs as it stands, but for the port."""
    instructions = re.findall(r"^([A-Z]+) (.+)$", text_of("Containerfile"), re.MULTILINE)
    for name, arguments in instructions:
        if name == "COPY":
            shutil.copy(EXAMPLE / arguments.split()[0], tmp_path)
    assert instructions[0][0] == "FROM"
    (command,) = [yaml.safe_load(arguments) for name, arguments in instructions if name == "CMD"]
    port = free_port()
    words = [str(port) if word == "8000" else "127.0.0.1" if word == "0.0.0.0" else word for word in command]
    environment = {"STREAMS_URL": f"sqlite:///{tmp_path}/streams.db"}
    with Process([sys.executable, "-m", *words], tmp_path, lambda: is_ready(port), environment=environment):
        (health,) = [arguments.removeprefix("CMD ") for name, arguments in instructions if name == "HEALTHCHECK"]
        asked = [word.replace("8000", str(port)) for word in yaml.safe_load(health)]
        subprocess.run([sys.executable, *asked[1:]], check=True, timeout=50)


def test_the_page_shows_the_files_that_are_tested() -> None:
    page = PAGE.read_text()
    for name in ("app.py", "nginx.conf", "Caddyfile", "answers@.service", "Containerfile", "kubernetes.yaml"):
        assert f"(../../examples/deploy/{name})" in page, name
    for name in ("app.py", "nginx.conf", "Caddyfile", "answers@.service", "Containerfile"):
        assert f"```{LANGUAGES.get(name, '')}\n{text_of(name)}```\n" in page, name


def test_a_requirement_of_the_example_is_an_extra_of_ours() -> None:
    (extras,) = re.findall(r"^streamkeep\[([\w,]+)\]", text_of("requirements.txt"), re.MULTILINE)
    assert shlex.split(extras.replace(",", " ")) == ["fastapi", "postgres"]
