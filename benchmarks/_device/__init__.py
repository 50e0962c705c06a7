"""The parts of ``benchmarks/device.py``: one file each, and what they share."""
