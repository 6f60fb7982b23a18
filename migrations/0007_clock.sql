-- Postgres' clock may be set back: then a lease, or a worker's sign of life, would last as much longer. None is longer than
-- ten minutes (the most that CDC_LEASE_SECONDS may be), so what ends later is of before.
create function cdc.is_over(expires_at timestamptz) returns boolean
language sql volatile
as $$ select expires_at not between clock_timestamp() and clock_timestamp() + interval '10 minutes' $$;

create or replace function cdc.is_free(holder text, expires_at timestamptz, holder_pid integer) returns boolean
language sql volatile
as $$ select holder is null or cdc.is_over(expires_at) or cdc.is_dead(holder_pid) $$;
