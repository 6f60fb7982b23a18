-- The log of dirty keys, and what the worker keeps about it. Everything lives in the schema cdc; the application's own
-- tables get triggers and nothing else (see cdc_worker/capture.py).

-- One row per mirror that was ever configured. The outbox names a mirror by this small number.
create table cdc.mirror (
    id          smallint generated always as identity primary key,
    name        text not null unique,
    definition  text not null,                 -- digest of query, key and target: a change means a rescan
    configured  boolean not null default true
);

-- Which partition of the outbox capture writes to. A sequence, not a table: reading it costs a trigger next to nothing, and
-- turning it over is one setval() that no open transaction can hold up.
create sequence cdc.slot as smallint minvalue 0 maxvalue 2;
select setval('cdc.slot', 0);

-- Append-only: nothing is updated, nothing is deleted row by row; a partition that nobody needs is truncated whole.
--   xid   the top-level transaction that wrote the row: the cursor (a snapshot) is a statement about these
--   id    tells rows of one transaction apart while a large one is paged; its order means nothing, so it may be cached
--   at    when that transaction began: for the lag in the logs, never for order
--   key   text of the key column, or the JSON array of the texts of several; null: rescan the whole mirror
-- Fixed-width columns stand first, widest first, so that no row is padded.
create table cdc.outbox (
    id      bigint      not null generated always as identity (cache 32),
    xid     xid8        not null default pg_current_xact_id(),
    at      timestamptz not null default now(),
    slot    smallint    not null,
    mirror  smallint    not null,
    key     text
) partition by list (slot);

create table cdc.outbox_0 partition of cdc.outbox for values in (0);
create table cdc.outbox_1 partition of cdc.outbox for values in (1);
create table cdc.outbox_2 partition of cdc.outbox for values in (2);
create index outbox_xid_id on cdc.outbox (xid, id);

-- When capture last turned to the next partition. One row.
create table cdc.rotation (rotated_at timestamptz not null default now());
insert into cdc.rotation default values;

-- Where a shard's reader has got to, and who reads it. All of it in one row, so that one small update is the checkpoint.
--   position     every change that is visible in this snapshot is acknowledged
--   window_end   while a large window is paged: the snapshot that ends it, and the last row acknowledged in it
--   epoch        the last epoch that Convex handed out for this shard, and the deployment that did
--   incarnation  which Postgres this is (cluster, timeline, database, outbox): a restored one differs
--   token        rises with each change of holder; every write of a holder names its own
create table cdc.checkpoint (
    shard          text primary key,
    position       pg_snapshot not null default pg_current_snapshot(),
    window_end     pg_snapshot,
    after_xid      xid8        not null default '0',
    after_id       bigint      not null default 0,
    epoch          bigint      not null default 0,
    deployment     text,
    incarnation    text,
    token          bigint      not null default 0,
    holder         text,
    holder_pid     integer,                     -- backend of the holder's listener, where it has one: gone means dead
    expires_at     timestamptz,
    saved_at       timestamptz not null default now()
) with (fillfactor = 10);                       -- room for many versions of the row on its page: updates stay HOT
insert into cdc.checkpoint (shard) values ('0');

-- Keys that Convex or the mirror's own query refuses. A later good reading of the key takes it out again.
create table cdc.parked_key (
    mirror     smallint    not null references cdc.mirror (id),
    key        text        not null,
    class      text        not null check (class in ('mirror', 'row', 'rejected', 'refused')),
    reason     text        not null,
    attempts   integer     not null default 1,
    first_at   timestamptz not null default now(),
    last_at    timestamptz not null default now(),
    primary key (mirror, key)
);

-- Rescans under way or done: every existing row of a mirror is marked dirty, page by page; then every document that
-- Convex holds for it, so that what has no row any more is deleted.
create table cdc.backfill (
    mirror         smallint primary key references cdc.mirror (id),
    phase          text        not null check (phase in ('rows', 'documents', 'done')),
    with_documents boolean     not null,
    after          text,                        -- the last key marked in this phase
    marked         bigint      not null default 0,
    again          boolean     not null default false,  -- requested once more while under way
    reason         text        not null,
    requested_at   timestamptz not null default now(),
    finished_at    timestamptz
);
