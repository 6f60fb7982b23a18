-- Where a publication is `for all tables`, Postgres refuses to update or delete a row of a table that has neither a primary
-- key nor this: rotation and parking came to a halt. The log needs none: it is only appended to, and truncated.
alter table cdc.rotation replica identity full;
alter table cdc.parked_key replica identity full;
