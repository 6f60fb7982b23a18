-- Cheaper for writers: many keys in one row of the log, and no routing to a partition. Functions of 0001 go on writing
-- until `migrate` has replaced them: what they write is a row of one key, as ever.

-- A row stands for at most 64 keys, and its id for the last of them: the one before it has id - 1, and so on. So ids are
-- taken in steps of 64, and (xid, id) tells every key apart. Who has read a part of a row has not passed its id.
--   key   of a row for one key
--   keys  of a row for several; a null among them: rescan the whole mirror
alter table cdc.outbox alter id drop identity, add keys text[];
create sequence cdc.outbox_id as bigint increment 64 cache 32 owned by cdc.outbox.id;
-- A writer names the partition itself: what the table would have given, each partition gives.
alter table cdc.outbox alter id set default nextval('cdc.outbox_id');
alter table cdc.outbox_0 alter slot set default 0;
alter table cdc.outbox_1 alter slot set default 1;
alter table cdc.outbox_2 alter slot set default 2;
-- Keys are short, and looked at once: not worth to be compressed, nor a table of their own.
alter table cdc.outbox_0 alter keys set storage external, set (toast_tuple_target = 8000);
alter table cdc.outbox_1 alter keys set storage external, set (toast_tuple_target = 8000);
alter table cdc.outbox_2 alter keys set storage external, set (toast_tuple_target = 8000);

-- The log as it is read: key by key, wherever it stands. Page it by `row_id` first, which has the index.
create view cdc.dirty_key as
select o.xid, o.id as row_id, o.id - coalesce(cardinality(o.keys), 1) + k.place as id, o.at, o.mirror, k.key
from cdc.outbox o cross join lateral unnest(coalesce(o.keys, array[o.key])) with ordinality as k (key, place);

-- Which partition is written: planned into a writer's statements as a constant, planned anew when rotation replaces the
-- function. The sequence cdc.slot stays for the functions of 0001.
do $$ begin
    execute format('create function cdc.written() returns smallint language sql stable return %s::smallint',
                   coalesce(pg_sequence_last_value('cdc.slot'::regclass), 0));
end $$;

-- What stands for a column that is not there (cdc_worker/capture.py); both functions are planned as constants, too.
create type cdc.missing as enum ();
create function cdc.is_missing(anyelement) returns boolean language sql immutable as 'select false';
create function cdc.is_missing(cdc.missing) returns boolean language sql immutable as 'select true';
