"""Protocols in which a paper's claim can show, and the bench that runs them; ``evidence.py`` is the command."""
