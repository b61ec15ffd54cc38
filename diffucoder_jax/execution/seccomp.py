"""The system calls a confined process may make: an allow-list as a BPF program (seccomp(2)).

What is not listed fails with EPERM. Some calls are allowed by argument only, for reasons that were
attacks once: `kill` and `tgkill` reach the caller alone and never with SIGKILL (so that a SIGKILL
always came from outside); `clone` makes threads, never processes; `prlimit64` cannot shrink the
limits of another process of the same user; `fcntl` cannot make the kernel send a signal to somebody
else (F_SETOWN with F_SETSIG); `ioctl` has no terminal injection. `clone3` says ENOSYS, since its
flags lie in memory that a filter cannot read; glibc then falls back to `clone`.
"""

import ctypes
import errno
import functools
import os
import struct

MACHINES = {  # machine: (audit architecture, {name: number})
  "x86_64": (
    0xC000003E,
    dict(
      read=0, write=1, open=2, close=3, stat=4, fstat=5, lstat=6, poll=7, lseek=8, mmap=9,
      mprotect=10, munmap=11, brk=12, rt_sigaction=13, rt_sigprocmask=14, rt_sigreturn=15,
      ioctl=16, pread64=17, pwrite64=18, readv=19, writev=20, access=21, pipe=22, select=23,
      sched_yield=24, mremap=25, madvise=28, dup=32, dup2=33, pause=34, nanosleep=35,
      getitimer=36, alarm=37, setitimer=38, getpid=39, clone=56, exit=60, wait4=61, kill=62,
      uname=63, fcntl=72, fsync=74, ftruncate=77, getcwd=79, chdir=80, rename=82, mkdir=83,
      rmdir=84, unlink=87, readlink=89, umask=95, gettimeofday=96, getrlimit=97, getrusage=98,
      sysinfo=99, times=100, getuid=102, getgid=104, geteuid=107, getegid=108, getppid=110,
      getgroups=115, sigaltstack=131, fstatfs=138, gettid=186, futex=202, sched_getaffinity=204,
      getdents64=217, set_tid_address=218, restart_syscall=219, clock_gettime=228,
      clock_getres=229, clock_nanosleep=230, exit_group=231, epoll_wait=232, epoll_ctl=233,
      tgkill=234, openat=257, mkdirat=258, newfstatat=262, unlinkat=263, renameat=264,
      readlinkat=267, faccessat=269, pselect6=270, ppoll=271, set_robust_list=273, eventfd2=290,
      epoll_create1=291, dup3=292, pipe2=293, prlimit64=302, renameat2=316, getrandom=318,
      membarrier=324, statx=332, rseq=334, clone3=435, faccessat2=439,
    ),
  ),
  "aarch64": (
    0xC00000B7,
    dict(
      getcwd=17, eventfd2=19, epoll_create1=20, epoll_ctl=21, dup=23, dup3=24, fcntl=25, ioctl=29,
      mkdirat=34, unlinkat=35, renameat=38, fstatfs=44, ftruncate=46, faccessat=48, chdir=49,
      openat=56, close=57, pipe2=59, getdents64=61, lseek=62, read=63, write=64, readv=65,
      writev=66, pread64=67, pwrite64=68, pselect6=72, ppoll=73, readlinkat=78, newfstatat=79,
      fstat=80, fsync=82, exit=93, exit_group=94, set_tid_address=96, futex=98,
      set_robust_list=99, nanosleep=101, getitimer=102, setitimer=103, clock_gettime=113,
      clock_getres=114, clock_nanosleep=115, sched_getaffinity=123, sched_yield=124,
      restart_syscall=128, kill=129, tgkill=131, sigaltstack=132, rt_sigaction=134,
      rt_sigprocmask=135, rt_sigreturn=139, times=153, getgroups=158, uname=160, getrlimit=163,
      getrusage=165, umask=166, gettimeofday=169, getpid=172, getppid=173, getuid=174,
      geteuid=175, getgid=176, getegid=177, gettid=178, sysinfo=179, brk=214, munmap=215,
      mremap=216, clone=220, mmap=222, mprotect=226, madvise=233, wait4=260, prlimit64=261,
      renameat2=276, getrandom=278, membarrier=283, statx=291, rseq=293, clone3=435,
      faccessat2=439,
    ),
  ),
}  # fmt: skip

# Not for a process that has nowhere to write.
WRITING = {
  "rename", "mkdir", "rmdir", "unlink", "mkdirat", "unlinkat", "renameat", "renameat2", "ftruncate",
}  # fmt: skip
WRITE_FLAGS = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000  # O_WRONLY, RDWR, CREAT, TRUNC, TMPFILE
FCNTLS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, GETFD, SETFD, GETFL, SETFL, F_DUPFD_CLOEXEC
IOCTLS = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
CLONE_THREAD, CLONE_NEW = 0x10000, 0x7E020000  # a thread; a namespace of any kind
SIGKILL = 9

# BPF: load a word of seccomp_data, jump on it, return.
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x50000  # FAIL | errno
NUMBER, ARCHITECTURE = 0, 4  # offsets in seccomp_data
OWN_PID = 0x7D15C0DE  # stands for the caller's pid until `install`


def _argument(i):
  return 16 + 8 * i  # low half of the i-th argument, little-endian


def _operation(code, value, if_true=0, if_false=0):
  return struct.pack("HBBI", code, if_true, if_false, value)


def _call(number, body):
  """`body` for one call; it must return, since the loaded word is no longer the number."""
  return [_operation(EQUAL, number, 0, len(body)), *body]


def _one_of(argument, values, otherwise):
  """Allows a call when an argument is one of `values`, else fails with the errno `otherwise`."""
  body = [_operation(LOAD, _argument(argument))]
  for value in values:
    body += [_operation(EQUAL, value, 0, 1), _operation(RETURN, ALLOW)]
  return [*body, _operation(RETURN, FAIL | otherwise)]


def _no_bits(argument, bits, otherwise):
  return [
    _operation(LOAD, _argument(argument)),
    _operation(ANY_BIT, bits, 0, 1),
    _operation(RETURN, FAIL | otherwise),
    _operation(RETURN, ALLOW),
  ]


def _own_signal(signal_argument):
  return [
    _operation(LOAD, _argument(signal_argument)),
    _operation(EQUAL, SIGKILL, 0, 1),
    _operation(RETURN, FAIL | errno.EPERM),
    *_one_of(0, [OWN_PID], errno.EPERM),
  ]


@functools.cache
def program(machine, writes):
  """The BPF program as bytes, with `OWN_PID` in the places of the caller's pid.

  Args: machine: `os.uname().machine`. writes: whether files may be opened for writing at all.
  Raises: KeyError for a machine that `MACHINES` lacks.
  """
  architecture, numbers = MACHINES[machine]
  operations = [
    _operation(LOAD, ARCHITECTURE),
    _operation(EQUAL, architecture, 1, 0),
    _operation(RETURN, KILL),
    _operation(LOAD, NUMBER),
  ]
  if machine == "x86_64":  # the x32 numbers name the same calls again
    operations += [_operation(AT_LEAST, 0x40000000, 0, 1), _operation(RETURN, KILL)]
  bodies = {
    "kill": _own_signal(1),
    "tgkill": _own_signal(2),
    "clone3": [_operation(RETURN, FAIL | errno.ENOSYS)],
    "clone": [
      _operation(LOAD, _argument(0)),
      _operation(ANY_BIT, CLONE_NEW, 2, 0),
      _operation(ANY_BIT, CLONE_THREAD, 0, 1),
      _operation(RETURN, ALLOW),
      _operation(RETURN, FAIL | errno.EPERM),
    ],
    "prlimit64": _one_of(0, [0], errno.EPERM),
    "fcntl": _one_of(1, FCNTLS, errno.EPERM),
    "ioctl": _one_of(1, IOCTLS, errno.ENOTTY),
  }
  if not writes:
    bodies["openat"] = _no_bits(2, WRITE_FLAGS, errno.EROFS)
    bodies["open"] = _no_bits(1, WRITE_FLAGS, errno.EROFS)
  for name, number in sorted(numbers.items(), key=lambda item: item[1]):
    if writes or name not in WRITING:
      operations += _call(number, bodies.get(name, [_operation(RETURN, ALLOW)]))
  operations.append(_operation(RETURN, FAIL | errno.EPERM))
  return b"".join(operations)


class _Program(ctypes.Structure):
  _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def install(libc, writes):
  """Puts the filter on this process for good; needs no_new_privs. Raises OSError when refused."""
  body = program(os.uname().machine, writes)
  body = body.replace(struct.pack("I", OWN_PID), struct.pack("I", os.getpid()))
  buffer = ctypes.create_string_buffer(body, len(body))
  filter_ = _Program(len(body) // 8, ctypes.cast(buffer, ctypes.c_void_p))
  if libc.prctl(22, ctypes.c_ulong(2), ctypes.byref(filter_), 0, 0) != 0:  # PR_SET_SECCOMP
    raise OSError(ctypes.get_errno(), "seccomp: the filter was refused")
