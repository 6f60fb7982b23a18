-- Several readers side by side. A shard is the keys of the log whose hash says so, and has a row of cdc.checkpoint of its
-- own; how many there are is how many rows there are. `migrate` makes them anew when CDC_SHARDS changes.

--   epoch_floor  the highest epoch of the shards that were before: Convex hands out none below it
--   saves        how often this row was saved. It rises only, unless Postgres is set back: Convex is told now and then
alter table cdc.checkpoint
    add column epoch_floor bigint not null default 0,
    add column saves       bigint not null default 0;

-- Workers that are alive, so that each takes its even part of the shards: those that know of so many.
create table cdc.worker (
    name       text primary key,
    shards     integer     not null,
    expires_at timestamptz not null
);

-- The shard of a key, among so many. By the key alone: a user's status stays in its shard whatever its mirror is called.
-- What asks for a rescan (a null) is of some shard as well.
create function cdc.shard_of(key text, shards integer) returns integer
language sql immutable parallel safe
as $$ select ((hashtextextended(coalesce(key, ''), 0) & 9223372036854775807) % shards)::integer $$;

-- Whether a row of the log has a key of a shard.
create function cdc.is_of_shard(key text, keys text[], shards integer, number integer) returns boolean
language sql immutable parallel safe
as $$
    select case when keys is null then cdc.shard_of(key, shards) = number
                else exists (select from unnest(keys) as each (key) where cdc.shard_of(each.key, shards) = number) end
$$;

-- Whether the backend of a holder's listener is gone: the worker was killed, or its machine was.
create function cdc.is_dead(holder_pid integer) returns boolean
language sql stable
as $$
    select holder_pid is not null and not exists (
        select from pg_stat_activity a where a.pid = holder_pid and a.datname = current_database())
$$;

-- Whether a shard may be taken over.
create function cdc.is_free(holder text, expires_at timestamptz, holder_pid integer) returns boolean
language sql volatile
as $$ select holder is null or expires_at < clock_timestamp() or cdc.is_dead(holder_pid) $$;
