"""Streams of tasks: tasks, the loop over them, its command and its report."""
