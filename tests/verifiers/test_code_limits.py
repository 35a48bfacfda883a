"""Each thing that shuts a program in, alone: where all hold, one hides that another does not."""

import subprocess
import sys

import pytest

HEAD = """
import os, resource, socket, subprocess, sys
from tulu_lightning.verifiers import code_limits as limits
def refused(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return True
    return False
"""


def inside(code: str, folder) -> str:
    """What a fresh interpreter prints that runs the code in the folder; `skip` skips the test."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("skip"):
        pytest.skip(done.stdout.removeprefix("skip").strip())
    return done.stdout.strip()


def test_landlock_keeps_writing_to_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    code = """
if limits.libc.syscall(limits.SYS_LANDLOCK, None, 0, 1) < 1:
    print("skip this kernel has no Landlock")
    sys.exit()
open("../mine", "w").close()
limits.libc.prctl(limits.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
limits.lock_files()
open("here", "w").close(); os.mkdir("folder"); os.remove("here"); open(os.devnull, "w").close()
print([refused(*call) for call in ((open, "../other", "w"), (open, "../mine", "a"), (os.remove, "../mine"),
    (os.mkdir, "../folder"), (os.rename, "folder", "../folder"))], open("../mine").read() == "")
"""
    assert inside(code, tmp_path / "in") == "[True, True, True, True, True] True"


def test_landlock_refuses_tcp(tmp_path):
    code = """
if limits.libc.syscall(limits.SYS_LANDLOCK, None, 0, 1) < 4:
    print("skip this kernel's Landlock knows no network")
    sys.exit()
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
limits.libc.prctl(limits.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
limits.lock_files()
print(refused(socket.create_connection, server.getsockname()), refused(socket.create_server, ("127.0.0.1", 0)))
"""
    assert inside(code, tmp_path) == "True True"


def test_a_network_namespace_has_no_way_out(tmp_path):
    code = """
server = socket.create_server(("127.0.0.1", 0))
if "network" not in limits.isolate():
    print("skip this machine gives no namespaces")
    sys.exit()
print(refused(socket.create_connection, server.getsockname()), [name for _, name in socket.if_nameindex() if name != "lo"])
"""
    assert inside(code, tmp_path).startswith("True ")


def test_a_user_that_is_not_root_gets_namespaces_with_one_of_its_own(tmp_path):
    code = """
if not limits.drop_root() and os.geteuid() == 0:
    print("skip root cannot become another user here")
    sys.exit()
left = limits.isolate()
if not left:
    print("skip this machine gives a user no namespaces")
    sys.exit()
resource.setrlimit(resource.RLIMIT_NPROC, (8, 8))
children = 0
try:
    while children < 50:
        if os.fork() == 0:
            os.read(0, 1)
            os._exit(0)
        children += 1
except OSError:
    pass
print(sorted(left), 0 < children < 8)
"""
    assert inside(code, tmp_path) in ("['network', 'processes', 'user'] True", "['network', 'user'] True")


def test_root_becomes_a_user_of_its_own_that_may_read(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o600)
    code = """
if not limits.drop_root():
    print("skip not root, or root cannot become another user here")
    sys.exit()
open("own", "w").close()
print(os.getuid() >= limits.UIDS, os.getgroups(), open("../secret").read(), refused(open, "../secret", "w"))
"""
    assert inside(code, tmp_path / "in") == "True [] x True"


def test_where_there_are_no_namespaces_python_refuses(tmp_path):
    code = """
limits.refuse_network()
print([refused(*call) for call in ((socket.socket,), (subprocess.run, ["true"]), (os.system, "true"),
    (os.execv, "/bin/true", ["true"]), (socket.getaddrinfo, "localhost", 80))])
"""
    assert inside(code, tmp_path) == "[True, True, True, True, True]"


def test_limits_go_down_only(tmp_path):
    code = """
resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))
limits.limit({"seconds": 2.5, "memory_mb": 4096, "file_mb": 1})
print(resource.getrlimit(resource.RLIMIT_AS)[1] >> 20, resource.getrlimit(resource.RLIMIT_CPU)[1],
    resource.getrlimit(resource.RLIMIT_FSIZE)[0] >> 20, resource.getrlimit(resource.RLIMIT_CORE))
"""
    assert inside(code, tmp_path) == "300 3 1 (0, 0)"
