"""A `python` that starts at once, for recipes of many short commands: one process imports torch, transformers and the
project, and forks for each command that a small client on PATH hands to it.

    with warm.python(folder) as env: subprocess.run(["bash", "recipes/x.sh"], env=env)
"""

import contextlib
import importlib
import json
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = ("rescue", "pro", "tuna", "reward_model", "collect_candidates", "evaluate")
CLIENT = """#!{python} -ES
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
job = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
server.sendall(len(job).to_bytes(4, "big"))
socket.send_fds(server, [job[:1]], [0, 1, 2])
server.sendall(job[1:])
sys.exit((server.recv(1) or b"\\1")[0])
"""


@contextlib.contextmanager
def python(folder):
    """-> an environment in which `python` is the client."""
    address, client = str(folder / "socket"), folder / "bin" / "python"
    client.parent.mkdir()
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address], cwd=ROOT)
    try:
        while not os.path.exists(address):
            assert server.poll() is None, "the server of warm.py ended"
            time.sleep(0.05)
        yield os.environ | {"PATH": f"{client.parent}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    finally:
        server.terminate()
        server.wait()


def serve(address):
    sys.path.insert(0, str(ROOT))
    for script in SCRIPTS:
        importlib.import_module(script)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the system; the client is told by the child
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            run(connection)
        connection.close()


def run(connection):
    """In the child: take the client's arguments, folder, environment and files, run the script, tell its exit code."""
    size = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
    job, files, _, _ = socket.recv_fds(connection, 1, 3)
    argv, folder, env = json.loads(job + connection.recv(size - 1, socket.MSG_WAITALL))
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    code = 0
    try:
        sys.argv, sys.path[0] = argv, str(pathlib.Path(argv[0]).resolve().parent)
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(bytes([code & 255]))
    os._exit(code & 255)


if __name__ == "__main__":
    serve(sys.argv[1])
