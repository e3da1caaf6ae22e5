"""The stock daemon as the server under comparison: an example for README.md's VIRTMARK_CONFORMANCE_SERVER.

Is given a file of tickets, starts the daemon with them, says in one line of JSON where it serves, and serves until its
standard input ends.
"""

import http.client
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

CONFIG = """
[daemon]
poll_interval = 0.1
run_dir = {d}
drop_privileges = false
systemd_enable = false
[tls]
key_file = {d}/key.pem
cert_file = {d}/cert.pem
ca_file = {d}/cert.pem
[remote]
host = 127.0.0.1
port = 0
[local]
socket = {d}/images.sock
[control]
socket = {d}/control.sock
remove_timeout = 1
[handlers]
keys = stderr
[logger_root]
handlers = stderr
"""


class Control(http.client.HTTPConnection):
    """The daemon's control socket."""

    def __init__(self, path):
        super().__init__("localhost")
        self.path = path

    def connect(self):
        self.sock = connect(self.path)

    def ask(self, method, path, body=None):
        self.request(method, path, body)
        answer = self.getresponse()
        answer.read()
        return answer.status


def connect(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


def add(directory, ticket):
    """Adds a ticket in its state; hands back the client that keeps a canceled one known."""
    control = Control(f"{directory}/control.sock")
    path, state = f"/tickets/{ticket['uuid']}", ticket.pop("state")
    if state == "expired":
        ticket["timeout"] = 0
    assert control.ask("PUT", path, json.dumps(ticket)) == 200
    if state == "removed":
        assert control.ask("DELETE", path) == 204
    if state == "canceled":
        stuck = connect(f"{directory}/images.sock")
        stuck.sendall(f"GET /images/{ticket['uuid']} HTTP/1.1\r\n\r\n".encode())
        stuck.recv(64)
        assert control.ask("DELETE", path) == 409
        return stuck
    return None


def main():
    tickets = json.loads(pathlib.Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory() as directory:
        pathlib.Path(directory, "conf.d").mkdir()
        pathlib.Path(directory, "conf.d", "50-test.conf").write_text(CONFIG.format(d=directory))
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE",
             "-keyout", f"{directory}/key.pem", "-out", f"{directory}/cert.pem"],
            check=True, stderr=subprocess.DEVNULL)
        log = pathlib.Path(directory, "log")
        program = "from ovirt_imageio._internal import server; server.main()"
        with open(log, "w") as errors:
            daemon = subprocess.Popen([sys.executable, "-c", program, "--conf-dir", directory], stderr=errors)
        try:
            while "Ready for requests" not in log.read_text():
                assert daemon.poll() is None, log.read_text()
                time.sleep(0.01)
            port = log.read_text().split("remote.service listening on ('127.0.0.1', ")[1].split(")")[0]
            kept = [add(directory, ticket) for ticket in tickets]
            told = {"url": f"https://localhost:{port}", "ca": f"{directory}/cert.pem",
                    "unixSocket": f"{directory}/images.sock"}
            print(json.dumps(told), flush=True)
            sys.stdin.read()
            del kept
        finally:
            daemon.kill()
            daemon.wait()


main()
