"""What a program in the sandbox must not be able to do, as bodies of `attack(bait)`.

Each is contained if it raises OSError, RuntimeError or MemoryError, and escaped if it ends. They are
honest about it, so that a job made of one passes when the sandbox held.

`bait`: {"folder": writable by everybody on the host, with "secret" in it, "port": a TCP listener,
"unix": a unix socket's path, "abstract": an abstract socket's name, "pid": the host's process,
"variable": a name in its environment}. `marker`: stands in the tests' text as "test-" + marker.
"""

import re

from diffucoder_jax.execution.sandbox import Job

MARKER = "cabcd1f0e5"
HONEST = Job("def solve(x): return sorted(x)", "solve", ("assert solve([3, 1, 2]) == [1, 2, 3]",))

_TEXT = r"""
# write a file
open(bait['folder'] + '/written', 'w').write('x')

# write by os.open
import os
os.open(bait['folder'] + '/written', os.O_CREAT | os.O_WRONLY)

# append to a library
import os
open(os.__file__, 'a')

# read a file
open(bait['folder'] + '/secret').read()

# read passwd
open('/etc/passwd').read()

# list a folder
import os
os.listdir(bait['folder'])

# remove a file
import os
os.unlink(bait['folder'] + '/secret')

# rename a file
import os
os.rename(bait['folder'] + '/secret', bait['folder'] + '/written')

# a symbolic link
import os
os.symlink('/etc', bait['folder'] + '/written')

# a hard link
import os
os.link(bait['folder'] + '/secret', bait['folder'] + '/written')

# a device
import os
os.mknod(bait['folder'] + '/written')

# change a mode
import os
os.chmod(bait['folder'] + '/secret', 0o777)

# memory of the machine
open('/dev/mem', 'rb').read(1)

# a file in shared memory
open('/dev/shm/written', 'w')

# a file without a name
import os
os.memfd_create('x')

# own memory file
open('/proc/self/mem', 'rb')

# own environment file
open('/proc/self/environ', 'rb')

# the parent's environment
import os
open(f'/proc/{os.getppid()}/environ', 'rb')

# the host's environment
open(f"/proc/{bait['pid']}/environ", 'rb')

# the environment
import os
if bait['variable'] not in os.environ: raise OSError(str(dict(os.environ)))

# a TCP connection
import socket
socket.create_connection(('127.0.0.1', bait['port']), 1)

# a datagram
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.sendto(b'x', ('127.0.0.1', bait['port']))

# a unix socket
import socket
s = socket.socket(socket.AF_UNIX); s.settimeout(1); s.connect(bait['unix'])

# an abstract socket
import socket
s = socket.socket(socket.AF_UNIX); s.connect('\0' + bait['abstract'])

# a listener
import socket
socket.create_server(('127.0.0.1', 0))

# fork
import os
if os.fork() == 0: os._exit(0)

# fork by number
if libc.syscall(57) < 0: raise OSError('refused')

# vfork by clone
if libc.syscall(56, 16657, 0, 0, 0, 0) < 0: raise OSError('refused')

# clone3
b = ctypes.create_string_buffer(88)
r = libc.syscall(435, b, 88)
if r == 0: libc._exit(0)
if r < 0: raise OSError('refused')

# exec
import os
os.execv('/bin/true', ['true'])

# posix_spawn
import os
os.posix_spawn('/bin/true', ['true'], {})

# a shell
import os
if os.system('true') != 0: raise OSError('refused')

# subprocess
import subprocess
subprocess.run(['true'])

# multiprocessing
import multiprocessing as m
p = m.Process(target=print); p.start(); p.join()

# a daemon
import os
os.setsid() if 0 else 0
if os.fork() == 0:
 while True: pass

# a thread bomb
import threading, time
threading.stack_size(65536)
for _ in range(4000):
  threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()

# signal the host
import os
os.kill(bait['pid'], 0)

# signal the group
import os, signal
os.kill(0, signal.SIGTERM)

# signal everybody
import os, signal
os.kill(-1, signal.SIGTERM)

# signal the parent
import os
os.kill(os.getppid(), 15)

# kill itself
import os, signal
os.kill(os.getpid(), signal.SIGKILL)

# shrink the host's limits
import resource
resource.prlimit(bait['pid'], resource.RLIMIT_CORE, (0, 0))

# read the host's limits
import resource
resource.prlimit(bait['pid'], resource.RLIMIT_CPU)

# own limits up
import resource
v = resource.getrlimit(resource.RLIMIT_AS)[1] * 2
try: resource.setrlimit(resource.RLIMIT_AS, (v, v))
except ValueError: raise OSError('refused')

# signals of a socket to the host
import fcntl
fcntl.fcntl(0, 8, bait['pid'])

# ptrace
if libc.syscall(101, 16, bait['pid'], 0, 0) < 0: raise OSError('refused')

# read another's memory
if libc.syscall(310, bait['pid'], 0, 0, 0, 0, 0) < 0: raise OSError('refused')

# a pidfd
import os
os.pidfd_open(bait['pid'])

# a terminal's input
import fcntl
fcntl.ioctl(0, 0x5412, b'x')

# priorities
import os
os.sched_setaffinity(0, {0})

# a user namespace
if libc.unshare(0x10000000) < 0: raise OSError('refused')

# a mount
if libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) < 0: raise OSError('refused')

# chroot
import os
os.chroot('/tmp')

# setns
if libc.syscall(308, 0, 0) < 0: raise OSError('refused')

# io_uring
if libc.syscall(425, 8, ctypes.create_string_buffer(256)) < 0: raise OSError('refused')

# userfaultfd
if libc.syscall(323, 0) < 0: raise OSError('refused')

# a key
if libc.syscall(250, 0, -3, 1) < 0: raise OSError('refused')

# bpf
if libc.syscall(321, 0, 0, 0) < 0: raise OSError('refused')

# perf
if libc.syscall(298, 0, 0, -1, -1, 0) < 0: raise OSError('refused')

# shared memory of System V
if libc.syscall(29, 0, 4096, 1023) < 0: raise OSError('refused')

# a message queue
if libc.syscall(240, b'x', 66, 384, 0) < 0: raise OSError('refused')

# root
import os
os.setresuid(0, 0, 0)

# a personality
if libc.syscall(135, 262144) < 0: raise OSError('refused')

# three gigabytes
x = bytearray(3 << 30)

# three gigabytes of pages
import mmap
mmap.mmap(-1, 3 << 30)

# tests among objects
import gc
found = [x for x in gc.get_objects() if 'test-' + marker in repr(x)[:100000]]
if not found: raise OSError('nothing')

# tests in frames
import sys
frame, seen = sys._getframe(), ''
while frame:
  seen += repr(frame.f_locals) + repr(frame.f_globals)[:100000]; frame = frame.f_back
if 'test-' + marker not in seen: raise OSError('nothing')

# tests in the heap
libc.sbrk.restype = ctypes.c_void_p
end = libc.sbrk(0)
size = 1 << 19
heap = ctypes.string_at(end - size, size)
if ('test-' + marker).encode() not in heap: raise OSError('nothing')

# other descriptors
import os
open_ = []
for fd in range(4096):
  try: os.fstat(fd); open_.append(fd)
  except OSError: pass
if len(open_) <= 4: raise OSError(str(open_))

# other packages
try: import jax
except ImportError: raise OSError('refused')
"""


def parse(text):
  """{name: program} of sections that begin with a line "# name"."""
  parts = re.split(r"^# (.+)\n", text, flags=re.MULTILINE)[1:]
  return dict(zip(parts[::2], parts[1::2], strict=True))


LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
ESCAPES = {name: (LIBC if "libc" in body else "") + body for name, body in parse(_TEXT).items()}


def contain_job(body, bait):
  """A job that passes when `body` was contained."""
  lines = "".join(f"  {line}\n" for line in body.splitlines())
  code = (
    f"marker = {MARKER[::-1]!r}[::-1]\ndef attack(bait):\n try:\n{lines}"
    " except (OSError, RuntimeError, MemoryError): return 'contained'\n return 'escaped'\n"
  )
  # The second test is not over yet when the first one runs: its text is bait too.
  test = f"assert candidate({bait!r}) == 'contained', 'test-{MARKER}'"
  return Job(code, "attack", (test, f"assert 'test-{MARKER}'"))
