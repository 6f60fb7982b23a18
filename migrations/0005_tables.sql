-- What a mirror's rows depended on when the worker last looked, and no trigger tells of. Null: it has not looked yet.
--   tables   those with rows: partitions and heirs come and go
--   columns  of its sources, with their types: an ALTER TABLE may rewrite every value
alter table cdc.mirror
    add column tables  bigint[],
    add column columns text[];
