"""A small application, Postgres, Convex and the worker between them, on one machine: `make demo`.

stage        Postgres, the local Convex, and the worker as production runs it
application  writes as a Prisma app would
rows         what Convex ought to hold, by plain SQL and not by the worker's mirrors
convex_reads queries by HTTP and WebSocket, with none of the worker's code
dashboard    watches the public queries, as a browser would
sightings    when each change was seen there
comparison   at the end: every row against every document
screen       what a person sees
"""
