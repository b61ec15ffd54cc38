"""A folder's files as documents: listed in order, described, read one by one within limits.

What cannot be read is a document too: one that says why.
"""

import os
import stat
import sysconfig
from typing import NamedTuple

from diffucoder_jax.data import filters, sources

_FILES_PER_CHUNK = 2000
_LICENSE_FILES = ("license", "licence", "copying", "unlicense")


class Raw(NamedTuple):
  """A document as it lies there; `contents` is None when `reason` says why there is none."""

  name: str
  contents: bytes | str | None = None
  language: str = ""
  license: str = ""
  reason: str = ""
  detail: str = ""


def cut_folder(data, settings):
  """Chunks of the files below `path` that match `pattern`."""
  root = os.fspath(sources.existing(data["path"]))
  if not os.path.isdir(root):
    raise ValueError(f"data.path={root!r} is a file; source 'folder' needs a folder")
  return _file_chunks(walk(root, data["pattern"].split("/")), settings)


def cut_stdlib(_, settings):
  """Chunks of the running interpreter's standard library, without what `sources` leaves out."""
  root = sysconfig.get_paths()["stdlib"]
  entries = walk(root, ["**", "*.py"], skip=sources.NOT_STDLIB)
  kept = (e for e in entries if not e["name"].rsplit("/", 1)[-1].startswith("_sysconfigdata"))
  return _file_chunks(({**entry, "license": "PSF-2.0"} for entry in kept), settings)


def _file_chunks(entries, settings):
  gathered, weight = [], 0
  for entry in entries:
    gathered.append(entry)
    weight += min(entry.get("size", 0), settings.read_limit)
    if weight >= settings.chunk_bytes or len(gathered) == _FILES_PER_CHUNK:
      yield {"kind": "files", "weight": weight, "entries": gathered}
      gathered, weight = [], 0
  if gathered:
    yield {"kind": "files", "weight": weight, "entries": gathered}


def walk(folder, pattern, prefix="", inherited="", skip=()):
  """Entries of the files that match, sorted by name; memory is that of the folders on the path.

  An entry has name, path, size, changed and license, or name, reason and detail.
  """
  try:
    with os.scandir(folder) as scanned:
      children = list(scanned)
  except OSError as error:
    yield lost(prefix or folder, error)
    return
  here = _license_here(children) or inherited
  # With the slash, the order is that of the whole names.
  real = {child.name: child.is_dir(follow_symlinks=False) for child in children}
  for child in sorted(children, key=lambda child: child.name + "/" * real[child.name]):
    name = prefix + child.name
    if real[child.name]:
      if child.name not in skip:
        yield from walk(child.path, pattern, name + "/", here, skip)
      continue
    matches = sources.matches(name.split("/"), pattern)
    try:
      status = child.stat()
    except OSError as error:
      if matches:
        yield lost(name, error)
      continue
    if stat.S_ISDIR(status.st_mode):
      yield {"name": name, "reason": "linked_folder", "detail": os.readlink(child.path)}
    elif matches and not stat.S_ISREG(status.st_mode):
      # Opening a pipe would wait for ever.
      yield {"name": name, "reason": "unreadable", "detail": "not a regular file"}
    elif matches:
      yield {"name": name, "path": child.path, "size": status.st_size,
             "changed": status.st_mtime_ns, "license": here}  # fmt: skip


def _license_here(children):
  for child in sorted(children, key=lambda child: child.name):
    if child.name.lower().split(".")[0].startswith(_LICENSE_FILES):
      try:
        if child.is_file():
          with open(child.path, "rb") as opened:
            found = filters.license_of(opened.read(64_000).decode("utf-8", "replace"))
          if found:
            return found
      except OSError:
        continue  # a licence that cannot be read is an unknown licence
  return ""


def lost(name, error):
  """The entry of a file or folder that the file system does not give."""
  return {"name": name, "reason": "unreadable", "detail": error.strerror or str(error)}


def read_files(chunk, _, settings):
  """The documents of a chunk of files."""
  for entry in chunk["entries"]:
    name = shown(entry["name"])
    if "reason" in entry:
      yield Raw(name, reason=entry["reason"], detail=entry["detail"])
      continue
    contents, size = None, entry["size"]
    try:
      if size <= settings.read_limit:
        with open(entry["path"], "rb") as opened:
          contents = opened.read(settings.read_limit + 1)
        size = max(size, len(contents))  # it may have grown since it was listed
    except OSError as error:
      yield Raw(name, **{k: v for k, v in lost(name, error).items() if k != "name"})
      continue
    if size > settings.read_limit:
      yield too_large(name, f"{size} bytes", settings)
    else:
      yield Raw(name, contents, filters.language_of(name), entry["license"])


def shown(name: str) -> str:
  """A file's name as valid text; bytes that are no UTF-8 are written as \\xNN."""
  return os.fsencode(name).decode("utf-8", "backslashreplace")


def too_large(name, size, settings):
  """The document that stands for one beyond `read_limit`."""
  return Raw(name, reason="too_large", detail=f"{size} > {settings.read_limit}")
