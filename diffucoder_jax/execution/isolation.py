"""What a confined process is left with: namespaces, a file system of its own, Landlock, rlimits.

Two levels. `full`: the fork server lives in user, pid, mount, network, ipc and uts namespaces of its
own, whose root is a read-only tmpfs with nothing but the Python library, and each answer gets a pid
namespace and an empty /tmp. `no-userns`: no privilege and no namespaces; Landlock leaves the Python
library to read and nothing to write. Both add the seccomp filter, rlimits and no_new_privs.
Linux only; x86-64 and aarch64. References: namespaces(7), pivot_root(2), landlock(7), capset(2).
"""

import contextlib
import ctypes
import errno
import os
import resource
import signal
import struct
import sys
import sysconfig

from diffucoder_jax.execution import seccomp

libc = ctypes.CDLL(None, use_errno=True)

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
PR_SET_CHILD_SUBREAPER = 36
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 38
CAP_DAC_READ_SEARCH = 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
UNPRIVILEGED = 60001  # the user that root turns into: limits on processes do not bind uid 0
TMP_FOLDERS = ("/tmp", "/var/tmp")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

# Landlock: fs rights by the ABI that brought them, and what reading and writing need of them.
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
FS_FIRST, FS_REFER, FS_TRUNCATE, FS_IOCTL = (1 << 13) - 1, 1 << 13, 1 << 14, 1 << 15
FS_EXECUTE, FS_WRITE, FS_READ, FS_READ_DIR = 1, 2, 4, 8
FS_MAKE_CHAR, FS_MAKE_SOCKET, FS_MAKE_BLOCK = 64, 512, 2048


def _check(result, what):
  if result < 0:
    code = ctypes.get_errno()
    raise OSError(code, f"{what}: {os.strerror(code)}")
  return result


def unshare(flags):
  """Enters new namespaces; raises OSError."""
  _check(libc.unshare(ctypes.c_int(flags)), "unshare")


def enter(namespace_fd, kind):
  """Goes (back) to the namespace behind a descriptor; raises OSError."""
  _check(libc.setns(namespace_fd, kind), "setns")


def _mount(source, target, kind, flags, options=""):
  words = [text.encode() if text else None for text in (source or "none", target, kind, options)]
  _check(libc.mount(*words[:3], ctypes.c_ulong(flags), words[3]), f"mount {target}")


def _prctl(option, value):
  return libc.prctl(option, *(ctypes.c_ulong(x) for x in (value, 0, 0, 0)))


def die_with_parent():
  """This process is killed when the thread that forked it ends."""
  _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans():
  """Processes whose parents end become children of this one, so that `kill_children` finds them."""
  _prctl(PR_SET_CHILD_SUBREAPER, 1)


def kill_children():
  """Kills and reaps every child, and theirs as they become ours. Reads /proc."""
  while True:
    with open(f"/proc/self/task/{os.getpid()}/children") as f:
      pids = list(map(int, f.read().split()))
    if not pids:
      return
    for pid in pids:
      os.kill(pid, signal.SIGKILL)
      os.waitpid(pid, 0)


def python_paths():
  """What a program has to read in order to import the standard library: absolute paths."""
  paths = ["/usr/lib", "/lib", "/lib64", "/usr/lib64", "/usr/share/zoneinfo"]
  own = [sysconfig.get_path("stdlib"), sysconfig.get_config_var("LIBDIR") or "/usr/lib"]
  for path in own + list(map(os.path.realpath, own)):  # both, where a link leads to the library
    if not any(path == known or path.startswith(known + "/") for known in paths):
      paths.append(path)
  return [path for path in paths if os.path.exists(path)]


# The jail ----------------------------------------------------------------------------------------


def _become_a_child():
  """Forks; the parent waits for the child and ends with it. Returns in the child only."""
  pid = os.fork()
  if pid:
    os.closerange(0, 4096)
    os.waitpid(pid, 0)
    os._exit(0)
  die_with_parent()


def _map_own_id(proc_fd, uid, gid):
  for name, text in (
    ("setgroups", "deny"),
    ("gid_map", f"{gid} {gid} 1"),
    ("uid_map", f"{uid} {uid} 1"),
  ):
    fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc_fd)
    os.write(fd, text.encode())
    os.close(fd)


def _bind(source, root):
  """The same path under `root`, read-only unless a device; flags that are locked are kept."""
  target = root + source
  if os.path.isdir(source):
    os.makedirs(target, exist_ok=True)
  else:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
  _mount(source, target, None, BIND | REC)
  if source not in DEVICES:
    kept = os.statvfs(source).f_flag & (NOSUID | NODEV | NOEXEC)
    _mount(None, target, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV | kept)


def enter_jail(paths):
  """Moves this process into namespaces and a root file system that hold nothing but `paths`.

  Forks on the way (a pid namespace begins with a child); the caller goes on in the child, as an
  unprivileged user outside and with capabilities over its own namespaces only.
  Args: paths: absolute paths to bind read-only.
  Returns: a descriptor of the pid namespace, to come back to after each job's own.
  Raises: OSError where namespaces or mounts are refused (by doing it: sysctls do not tell).
  """
  uid, gid = os.getuid(), os.getgid()
  root = uid == 0
  proc_fd = os.open("/proc", os.O_PATH | os.O_DIRECTORY)  # the jail has no /proc
  spaces = NEWNS | NEWNET | NEWIPC | NEWUTS | NEWPID | NEWCGROUP
  unshare(spaces if root else spaces | NEWUSER)
  if not root:
    _map_own_id(proc_fd, uid, gid)
  _become_a_child()
  _mount(None, "/", None, REC | PRIVATE)
  base = free_folder(
    paths, [path for path in ("/tmp", "/run", "/mnt", "/opt") if os.path.isdir(path)]
  )
  _mount("tmpfs", base, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
  for path in (*paths, *DEVICES):
    _bind(path, base)
  for path in (*TMP_FOLDERS, "/old"):
    os.makedirs(base + path, exist_ok=True)
  os.chdir(base)
  _check(libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"old"), "pivot_root")
  os.chdir("/")
  _check(libc.umount2(b"/old", 2), "umount of the old root")
  os.rmdir("/old")
  _mount(None, "/", None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)
  if root:  # root would own the namespaces as the machine's root: go on as somebody else
    become_unprivileged()
    die_with_parent()  # which a change of user takes back
    _prctl(PR_SET_DUMPABLE, 1)  # or /proc/self/uid_map belongs to root
    unshare(NEWUSER | NEWNS | NEWPID)  # the pid namespace has to belong to the new user namespace
    _map_own_id(proc_fd, UNPRIVILEGED, UNPRIVILEGED)
    _become_a_child()
  pid_namespace = os.open("self/ns/pid", os.O_RDONLY, dir_fd=proc_fd)
  os.close(proc_fd)
  return pid_namespace


def become_unprivileged():
  """From root to a user who owns nothing."""
  os.setgroups([])
  os.setresgid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
  os.setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)


def leave_root(paths):
  """Outside a jail: root turns into a user who owns nothing and can still read `paths`.

  Where it could not otherwise (a Python below /root), it keeps the one capability to read, which
  Landlock confines to `paths`. Returns: the capabilities kept, as bits.
  """
  if os.getuid() != 0:
    return 0
  os.seteuid(UNPRIVILEGED)
  reaches = all(os.access(path, os.R_OK, effective_ids=True) for path in paths)
  os.seteuid(0)
  kept = 0 if reaches else 1 << CAP_DAC_READ_SEARCH
  _prctl(PR_SET_KEEPCAPS, 1 if kept else 0)
  become_unprivileged()
  _set_capabilities(kept)
  _prctl(PR_SET_DUMPABLE, 1)
  return kept


def _set_capabilities(bits):
  sets = struct.pack("6I", bits, bits, 0, 0, 0, 0)  # effective, permitted, inheritable; high halves
  _check(libc.capset(struct.pack("Ii", 0x20080522, 0), sets), "capset")


def free_folder(paths, folders):
  """The first of `folders` that hides none of `paths` when something is mounted there."""
  for folder in folders:
    if not any(path.startswith(folder + "/") for path in paths):
      return folder
  raise OSError(errno.EBUSY, f"there is Python below each of {', '.join(folders)}")


class Tmp:
  """A tmpfs in the jail, empty for every answer. Attributes: path; fd: an O_PATH descriptor.

  It lies at /tmp, or at /var/tmp where Python itself lies below /tmp.
  """

  def __init__(self, size, paths):
    """Mounts it, `size` bytes; `paths`: what it may not hide. Raises OSError."""
    self.size, self.fd = size, None
    self.path = free_folder(paths, TMP_FOLDERS)
    self._mount()

  def _mount(self):
    options = f"size={self.size},nr_inodes=1024,mode=777"
    _mount("tmpfs", self.path, "tmpfs", NOSUID | NODEV | NOEXEC, options)
    self.fd = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    self._new = self._look()

  def _look(self):
    room, root = os.fstatvfs(self.fd), os.fstat(self.fd)
    return room.f_bfree, room.f_ffree, root.st_mtime_ns, root.st_ctime_ns, root.st_mode

  def renew(self):
    """Puts an empty one in its place if anything ever changed in it; returns whether it had."""
    if self._look() == self._new:
      return False
    os.close(self.fd)
    _check(libc.umount2(self.path.encode(), 2), f"umount of {self.path}")
    self._mount()
    return True


# Landlock ----------------------------------------------------------------------------------------


def landlock_abi():
  """The kernel's Landlock version, 0 where there is none."""
  return max(0, libc.syscall(LANDLOCK_CREATE, None, 0, 1))


def landlock_ruleset(read, write=()):
  """A ruleset under which `read` may be read, `write` may be changed, and nothing else happens.

  Args: read, write: paths. What the kernel's version cannot forbid (TCP, signals, abstract sockets
    before ABI 4 and 6), the seccomp filter does.
  Returns: a descriptor for `landlock_restrict`. Raises: OSError.
  """
  abi = landlock_abi()
  if abi < 1:
    raise OSError(errno.ENOSYS, "Landlock is not available in this kernel")
  rights = FS_FIRST
  for since, right in ((2, FS_REFER), (3, FS_TRUNCATE), (5, FS_IOCTL)):
    rights |= right if abi >= since else 0
  tcp, scoped = 3 if abi >= 4 else 0, 3 if abi >= 6 else 0
  attributes = struct.pack("QQQ", rights, tcp, scoped)[: 8 if abi < 4 else 16 if abi < 6 else 24]
  ruleset = _check(
    libc.syscall(LANDLOCK_CREATE, attributes, len(attributes), 0), "landlock_create_ruleset"
  )
  never = FS_EXECUTE | FS_MAKE_CHAR | FS_MAKE_BLOCK | FS_MAKE_SOCKET | FS_IOCTL
  for paths, granted in ((read, FS_READ | FS_READ_DIR), (write, rights & ~never)):
    for path in paths:
      fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
      fits = rights if os.path.isdir(path) else FS_READ | FS_WRITE | FS_TRUNCATE
      rule = struct.pack("=Qi", granted & rights & fits, fd)
      added = libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0)
      os.close(fd)
      _check(added, f"landlock_add_rule {path}")
  return ruleset


def landlock_restrict(ruleset):
  """Puts a ruleset on this process for good; needs no_new_privs. Raises OSError."""
  _check(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")


# One process -------------------------------------------------------------------------------------


def _limit(values):
  for name, value in values.items():
    hard = resource.getrlimit(name)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(name, (value, value))


def set_common_rlimits():
  """Hard limits that are the same for all jobs; children inherit them."""
  _limit(
    {
      resource.RLIMIT_CORE: 0,
      resource.RLIMIT_NOFILE: 64,
      resource.RLIMIT_STACK: 64 << 20,
      resource.RLIMIT_MEMLOCK: 0,
      resource.RLIMIT_MSGQUEUE: 0,
    }
  )


def set_rlimits(memory, files, cpu_seconds, processes):
  """Hard limits of this process: bytes of address space and of a file, seconds, threads."""
  _limit(
    {
      resource.RLIMIT_AS: memory,
      resource.RLIMIT_FSIZE: files,
      resource.RLIMIT_NPROC: processes,
      resource.RLIMIT_CPU: cpu_seconds,
    }
  )


def drop_privileges(kept=0):
  """No capability but `kept`, no way to get one, nobody may look inside. Raises OSError."""
  if _prctl(PR_SET_NO_NEW_PRIVS, 1) != 0:
    raise OSError(ctypes.get_errno(), "no_new_privs was refused")
  _prctl(PR_SET_DUMPABLE, 0)
  _set_capabilities(kept)


def filter_calls(writes):
  """The seccomp filter; see `seccomp`."""
  seccomp.install(libc, writes)


def tasks_of_this_user():
  """How many threads the user has, whom RLIMIT_NPROC counts together. Reads /proc."""
  count, uid = 0, os.getuid()
  for name in os.listdir("/proc"):
    if name.isdigit():
      with contextlib.suppress(OSError):  # one that is gone meanwhile
        if os.stat(f"/proc/{name}").st_uid == uid:
          count += len(os.listdir(f"/proc/{name}/task"))
  return count


def missing(level):
  """What this machine lacks for a level, as far as one can tell without trying: a list of words."""
  if sys.platform != "linux":
    return [f"Linux (this is {sys.platform})"]
  lacks = []
  if level != "unsafe" and os.uname().machine not in seccomp.MACHINES:
    lacks.append(f"a seccomp table for {os.uname().machine}")
  if level == "no-userns" and landlock_abi() < 1:
    lacks.append("Landlock (Linux >= 5.13 with landlock among its security modules)")
  return lacks
