-- A key may be longer than an index row can be (some 2,700 bytes). So a parked key is told from others by a digest of 128
-- bits: a collision would hold one key's reason against another, and is not to be met. Not md5(), which a server in FIPS
-- mode refuses.
create function cdc.digest(key text) returns text
language sql immutable parallel safe
as $$ select hashtextextended(key, 0)::text || ' ' || hashtextextended(key, 1)::text $$;

alter table cdc.parked_key drop constraint parked_key_pkey;
create unique index parked_key_digest on cdc.parked_key (mirror, cdc.digest(key));
