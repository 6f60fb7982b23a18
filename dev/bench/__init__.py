"""Measures the worker against what a user would pick instead: `python -m dev.bench --help`.

Linux only: processor time and memory of the processes are read from /proc.
"""
