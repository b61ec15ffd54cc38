"""Pieces of work on several processes: results as they come, nothing left behind after a kill."""

import concurrent.futures
import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading


class Workers:
  """Processes that share a context. Use it in a `with` statement.

  Args:
    context: what all calls get; sent to each process once.
    count: number of processes; with 1 the work is done in this one.
  """

  def __init__(self, context, count: int):
    self.context, self.count = context, count

  def __enter__(self):
    self._pool = None
    if self.count > 1:
      spawn = multiprocessing.get_context("spawn")
      self._pool = concurrent.futures.ProcessPoolExecutor(
        self.count, spawn, _begin, (self.context,)
      )
    return self

  def __exit__(self, *_):
    if self._pool:
      self._pool.shutdown(cancel_futures=True)

  def run(self, function, pieces):
    """Yields `function(context, piece)` for every piece, in the order in which they finish.

    Args:
      function: a function of a module, which processes can import.
      pieces: iterable, read only as far ahead as keeps the processes busy.
    Raises:
      RuntimeError: a process died, for instance for lack of memory.
    """
    if not self._pool:
      for piece in pieces:
        yield function(self.context, piece)
      return
    pieces = iter(pieces)
    try:
      submit = lambda piece: self._pool.submit(_call, function, piece)  # noqa: E731
      waiting = {submit(piece) for piece in itertools.islice(pieces, 2 * self.count)}
      while waiting:
        done, waiting = concurrent.futures.wait(
          waiting, return_when=concurrent.futures.FIRST_COMPLETED
        )
        for future in done:
          yield future.result()
          waiting |= {submit(piece) for piece in itertools.islice(pieces, 1)}
    except concurrent.futures.process.BrokenProcessPool as error:
      raise RuntimeError(
        "a worker process died, perhaps for lack of memory; run the same command again, it goes on "
        "where it stopped, or use fewer --workers"
      ) from error


_CONTEXT = []


def _begin(context):
  _CONTEXT[:] = [context]
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
  """A killed parent cannot end its workers, and they would wait for it for ever."""
  multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)


def _call(function, piece):
  return function(_CONTEXT[0], piece)
