"""What a user would pick instead: each a small program of ours on somebody's package, one POST for each job.

They run in an environment of their own (dev/bench/rivals.py), with `setup DSN JOBS` and then `work DSN URL`.
"""
