"""A corpus cut into chunks: pieces that any process can read, in any order, in constant memory.

`cut` lists the corpus and yields chunks, which are JSON values; `read` yields the documents of one.
Names and their order are those of `sources`, whatever the size of the chunks.
"""

from collections.abc import Iterator

from diffucoder_jax.data import containers, files


def cut(data: dict, settings) -> Iterator[dict]:
  """Yields the chunks of the corpus named by the `data` section.

  Every chunk has a `weight` (bytes or records, for progress) and describes its input so exactly
  (path, size, time of change) that a chunk of equal text need not be read again.

  Raises:
    FileNotFoundError, ValueError: the section names nothing that can be read.
  """
  if data["source"] not in CUTTERS:
    raise ValueError(f"unknown data.source {data['source']!r}; known: {', '.join(CUTTERS)}")
  return CUTTERS[data["source"]](data, settings)


def read(chunk: dict, data: dict, settings) -> Iterator[files.Raw]:
  """Yields the documents of a chunk in order, one at a time."""
  return READERS[chunk["kind"]](chunk, data, settings)


CUTTERS = {
  "stdlib": files.cut_stdlib,
  "folder": files.cut_folder,
  "jsonl": containers.container_chunks("**/*.jsonl", containers.cut_jsonl),
  "parquet": containers.container_chunks("**/*.parquet", containers.cut_parquet),
  "array_record": containers.container_chunks("**/*.array_record*", containers.cut_array_record),
  "tfds": containers.cut_tfds,
}
READERS = {
  "files": files.read_files,
  "lines": containers.read_lines,
  "rows": containers.read_rows,
  "records": containers.read_records,
  "tfds": containers.read_tfds,
}
