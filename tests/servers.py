"""Servers on the loopback interface, for the length of a test."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"]))


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serving(command, port):
    """Run a server until the block ends; it begins when the server answers."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for_port(port, server)
        yield
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def s3_server():
    """Yield the address of an S3 server with nothing in it."""
    port = free_port()
    with serving([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def ssh_server(place):
    """Yield the address of OpenSSH's server: SFTP and nothing else, with keys that nobody else has, `host` and `user` in the folder."""
    if not SSHD:
        pytest.skip("no sshd on this machine")
    port = free_port()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)], check=True)
    settings = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": place / "host",
        "AuthorizedKeysFile": place / "user.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "Subsystem": "sftp internal-sftp",
        "ForceCommand": "internal-sftp",
    }
    (place / "config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    with _privilege_separation(), serving([SSHD, "-D", "-e", "-f", str(place / "config")], port):
        yield f"ssh://127.0.0.1:{port}"


@contextlib.contextmanager
def _privilege_separation():
    """The empty folder that sshd wants to see where root starts it, as the system's own service makes it."""
    folder = Path("/run/sshd")
    made = os.geteuid() == 0 and not folder.exists()
    if made:
        folder.mkdir(mode=0o755)
    try:
        yield
    finally:
        if made:
            folder.rmdir()


def _wait_for_port(port, server):
    for _ in range(600):
        assert server.poll() is None, f"{server.args} ended at once"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"{server.args} does not answer")
