"""One runnable file per experiment; the docstring is the command, the result and the time."""
