"""The exit statuses of all commands."""

DONE = 0
FAILURE = 1
BAD_INPUT = 2
PREEMPTED = 75  # stopped, and saved where there is something to save: run the command again
INTERRUPTED = 130
