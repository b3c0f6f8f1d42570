"""docker-compose.yml as it stands: real containers, the exit status that a user sees, and kills."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.requirements import need

ROOT = Path(__file__).parents[2]
# COMPOSE="docker compose" tests another implementation.
COMPOSE = os.environ.get("COMPOSE", "docker-compose").split()
# The first `up` builds the image.
pytestmark = pytest.mark.timeout(600)


class Project:
    """A compose project of its own, under a name that no test before it had."""

    count = itertools.count()

    def __init__(self, base: str) -> None:
        self.name = f"xbmigrate-test-{os.getpid()}-{next(self.count)}"
        self.environment = {**os.environ, "BASE": base, "COMPOSE_PROJECT_NAME": self.name}

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMPOSE, "--profile", "ledger", *words], cwd=ROOT, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *words: str, timeout: float = 60) -> tuple[int, str]:
        """(exit status, all it said)"""
        process = self.start(*words)
        try:
            out, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return process.returncode, out

    def up(self, service: str) -> tuple[int, str]:
        return self.run("up", "--build", "--attach-dependencies", service, timeout=540)

    def logs(self, *services: str) -> str:
        return self.run("logs", "--no-color", *services)[1]

    def container(self, service: str) -> str:
        # docker-compose ps leaves out what has ended, and stumbles over what goes meanwhile
        return docker(
            "ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={self.name}",
            "--filter", f"label=com.docker.compose.service={service}",
        )  # fmt: skip

    def inspect(self, service: str, what: str) -> str:
        return docker("inspect", "--format", f"{{{{{what}}}}}", self.container(service))

    def down(self) -> None:
        self.run("down", "--volumes", "--timeout", "1")


def docker(*words: str) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr}"
    return done.stdout.strip()


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="session")
def base() -> str:
    need(shutil.which("docker"), "the compose demo needs docker")
    need(shutil.which(COMPOSE[0]), f"the compose demo needs {COMPOSE[0]}")
    running = subprocess.run(["docker", "version"], capture_output=True, check=False)
    need(running.returncode == 0, "the compose demo needs a Docker engine that runs")
    made = subprocess.run(
        [ROOT / "tests/compose/base.sh"], stdout=subprocess.PIPE, text=True, check=False
    )
    need(made.returncode == 0, "the compose demo needs an image with Python to build from")
    return made.stdout.strip()


@pytest.fixture
def project(base: str) -> Iterator[Project]:
    project = Project(base)
    project.down()
    try:
        yield project
    finally:
        project.down()


def test_demo_guest_moves_and_is_verified(project: Project) -> None:
    """Exit status 0 means that the guest ran in dst and each of its bytes was right there."""
    status, said = project.up("verdict")
    assert status == 0, said
    assert "every one of its 268435456 bytes is right" in said
    assert "VERDICT: OK" in said
    logs = project.logs("dst", "src")
    assert "Migration status: completed" in logs
    assert "refused" not in logs  # nobody but the source ever connects to the migration port
    for service in ("src", "dst", "check", "verdict"):
        assert project.inspect(service, ".State.ExitCode") == "0", service
        assert project.inspect(service, ".Config.User") == "xbmigrate"


def test_program_goes_on_on_the_other_node_with_all_it_had_acknowledged(project: Project) -> None:
    status, said = project.up("ledger-verdict")
    assert status == 0, said
    assert "VERDICT: OK, nothing that was acknowledged is lost" in said
    assert "all as they must be; going on" in project.logs("ledger-b")


def killed_in_the_middle(project: Project, victim: str) -> str:
    """What `up` says when a node is killed in round 1; it must not end with 0."""
    project.environment["BANDWIDTH"] = "16m"  # 16 s: the kill comes in time on a busy machine too
    up = project.start("up", "--build", "verdict")
    try:
        until(lambda: "round 1" in project.logs("src"), 540)
        docker("kill", project.container(victim))
        said, _ = up.communicate(timeout=60)
    finally:
        up.kill()
    assert up.returncode != 0, said
    assert "VERDICT: OK" not in said + project.logs()
    return said


def test_up_fails_where_the_destination_is_killed_and_the_guest_goes_on(project: Project) -> None:
    """Not only must the failure be seen: the guest is not lost, it runs on in src, whole."""
    killed_in_the_middle(project, "dst")
    assert project.inspect("src", ".State.Health.Status") == "healthy"
    for _ in range(2):
        status, said = project.run(
            "exec", "-T", "src", "python", "-I", "-m", "migrate.guests.demo.check"
        )
        assert status == 0, said
        assert "every one of its 268435456 bytes is right" in said
    began = time.monotonic()
    docker("stop", "--time", "30", project.container("src"))
    assert time.monotonic() - began < 15  # it ends on SIGTERM, and need not be killed
    assert project.inspect("src", ".State.ExitCode") == "1"


def test_up_fails_where_the_source_is_killed_and_no_half_guest_runs(project: Project) -> None:
    killed_in_the_middle(project, "src")
    until(lambda: project.inspect("dst", ".State.Running") == "false", 30)
    assert project.inspect("dst", ".State.ExitCode") == "1"
    assert "completed" not in project.logs("dst")


def test_stopping_a_node_in_the_middle_puts_the_guest_back(project: Project) -> None:
    """docker stop is SIGTERM: dst says why, and src goes on with its guest."""
    project.environment["BANDWIDTH"] = "16m"  # 16 s: the kill comes in time on a busy machine too
    up = project.start("up", "--build", "verdict")
    try:
        until(lambda: "round 1" in project.logs("src"), 540)
        docker("stop", "--time", "30", project.container("dst"))
        up.communicate(timeout=60)
    finally:
        up.kill()
    assert up.returncode != 0
    assert project.inspect("dst", ".State.ExitCode") == "143"
    assert "the other side gave up: cancelled at the destination" in project.logs("src")
    status, said = project.run(
        "exec", "-T", "src", "python", "-I", "-m", "migrate.guests.demo.check"
    )
    assert status == 0, said
