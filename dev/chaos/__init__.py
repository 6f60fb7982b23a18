"""Worker, Postgres and Convex under faults: schedules of plain data are played, and the two ends compared.

    generator, written   schedules: from a seed, or written down
    schedule             the language they are in: what may happen
    world                plays one: supervisor and workers, writers, servers, network, failpoints
    witness, comparison  what Postgres and Convex hold, and what is wrong with it; application says which rows are which
    campaign, command    many of them, and the command; shrink makes one that fails smaller

`make chaos SEED=7`, `make chaos SEEDS=1000`; docs/reliability.md.
"""
