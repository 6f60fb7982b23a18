-- An application sees nextval(): lastval() in its session told of the log's sequence, a wrong number, or failed for a role
-- without rights on it. Doctrine, PDO's lastInsertId() and EclipseLink ask for it after an insert. So what triggers write has
-- another id: a hash of what the row names, so that two rows of one transaction with the same id name the same keys, and
-- the worker reads one of them. In steps of 64, as ever.
-- What the worker marks by itself has the next number of the sequence, and so has what functions from before write.
create function cdc.row_id(key text, mirror integer) returns bigint language sql immutable
begin atomic
    select (coalesce(hashtextextended(key collate "C", mirror), mirror) & 144115188075855871) << 6;
end;
create function cdc.row_id(keys text[], mirror integer) returns bigint language sql immutable
begin atomic
    select (hash_array_extended(keys collate "C", mirror) & 144115188075855871) << 6;
end;
