"""The machinery of a fit that takes a task into a stream."""
