"""A `python` and a `torchrun` that start at once, for tests and recipes of many short commands: one process imports
torch, transformers and the project, and forks for each command that a small client on PATH hands to it.

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
import threading
import time
import traceback

from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = ("rescue", "pro", "tuna", "reward_model", "collect_candidates", "evaluate")
CLIENT = """#!{python} -ES
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
argv = [*{prefix!r}, *sys.argv[1 + (sys.argv[1] == "-u") :]]
job = json.dumps([argv, os.getcwd(), dict(os.environ)]).encode()
server.sendall(len(job).to_bytes(4, "big"))
socket.send_fds(server, [job[:1]], [0, 1, 2])
server.sendall(job[1:])
sys.exit((server.recv(1) or b"\\1")[0])
"""


@contextlib.contextmanager
def python(folder):
    """-> an environment in which `python` and `torchrun`, with the processes it starts, are clients."""
    address, client = str(folder / "socket"), folder / "bin" / "python"
    client.parent.mkdir()
    for name, prefix in (("python", []), ("torchrun", ["-m", "torch.distributed.run"])):
        client.with_name(name).write_text(CLIENT.format(python=sys.executable, address=address, prefix=prefix))
        client.with_name(name).chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address, str(os.getpid())], cwd=ROOT)
    try:
        while not os.path.exists(address):
            assert server.poll() is None, "the server of warm.py ended"
            time.sleep(0.05)
        path = f"{client.parent}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
        yield os.environ | {"PATH": path, "PYTHON_EXEC": str(client)}  # PYTHON_EXEC is torchrun's
    finally:
        server.terminate()
        server.wait()


def serve(address, parent):
    sys.path.insert(0, str(ROOT))
    for script in SCRIPTS:
        importlib.import_module(script)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    listener.settimeout(5)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the system; the client is told by the child
    while os.getppid() == parent:  # which may be killed
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            connection.setblocking(True)
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
    tqdm.set_lock(threading.RLock())  # that of all forks stays with one that is killed while it holds it
    threading.Thread(target=follow, args=[connection], daemon=True).start()
    code = 0
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
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


def follow(connection):
    """End with the client: torchrun, or a test, has killed it."""
    if not connection.recv(1):
        os._exit(1)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
