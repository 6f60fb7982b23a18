"""Worker, Postgres and Convex under faults: a schedule is plain data, a `World` plays it and compares at the end.

`schedule` says what may happen, `application` is the application whose rows are mirrored, `link` the network to Convex,
`workers` the real worker as processes, `world` plays. Used by tests/integration/test_convergence.py and `make chaos`.
"""
