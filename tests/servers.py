"""Servers on the loopback interface, for the length of a test."""

import contextlib
import socket
import subprocess
import sys
import time


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


def _wait_for_port(port, server):
    for _ in range(600):
        assert server.poll() is None, f"{server.args} ended at once"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"{server.args} does not answer")
