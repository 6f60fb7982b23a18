"""What a user would pick instead: each a small program of ours on somebody's package, one POST for each job, but for
the loop by hand that shows what batches are worth without the rest.

They run in an environment of their own (dev/bench/rivals.py), with `setup DSN JOBS` and then `work DSN URL`.
"""
