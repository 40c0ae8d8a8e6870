"""Run a grader's commands in processes with limits, of which nothing is left afterwards."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

# Limits of the tests of one exercise, and again of its hidden tests.
SECONDS = 300
MEMORY = 16 * 2**30  # address space of a process; importing torch takes 3 GiB of it
FILE_SIZE = 2**30
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")


def write_files(files, out):
    for name, content in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def protect():
    """Let this process survive signals, other than Ctrl-C and SIGKILL, and find lost processes.

    On Linux it becomes the parent of a submission's processes whose own parents have ended.
    """
    for name in ("HUP", "QUIT", "USR1", "USR2", "ALRM", "TERM", "TSTP"):
        signal.signal(getattr(signal, f"SIG{name}"), lambda *_: None)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def kill(process):
    """Kill a process with its group and our other children in sessions of their own.

    Returns whether all of them are gone, within ten seconds.
    """
    for _ in range(1000):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # the group has ended
        ended = process.poll() is not None
        lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
        children = [int(pid) for pid in " ".join(lists).split() if int(pid) != process.pid]
        children = [pid for pid in children if os.getsid(pid) != os.getsid(0)]
        if ended and not children:
            return True
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
    return False


def limit():
    resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def run_in_tree(folder, files, *command):
    """Run a Python command in a new tree, folder/tree. Returns None, or why it failed.

    Its results go to the empty folder ../out. What it prints goes to a file: a pipe would stay open
    as long as a child has it.
    """
    folder = Path(folder)
    write_files(files, folder / "tree")
    (folder / "out").mkdir()
    (folder / "tmp").mkdir()
    env = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    # A CPU gives the same numbers everywhere. More threads make such small models slower.
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with open(folder / "log", "w+b") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder / "tree",
            env=env | {"TMPDIR": str(folder / "tmp")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=limit,
        )
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return f"not finished after {SECONDS} s"
        finally:
            all_gone = kill(process)
        log.seek(max(0, log.seek(0, os.SEEK_END) - 10000))
        lines = log.read().decode(errors="replace").strip().splitlines()
    if not all_gone:
        return "left a process that cannot be killed"
    if process.returncode == 0:
        return None
    failed = [line for line in lines if line.startswith("FAILED")]
    return (failed or lines or [""])[-1] or f"exit code {process.returncode}"
