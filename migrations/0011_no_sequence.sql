-- The application sees nextval(): its own lastval() told of the log's sequence, a wrong number, or failed for a role without
-- rights on it. Doctrine, PDO's lastInsertId() and EclipseLink ask for that after an insert. So an id is a number by chance,
-- which has to differ from others of its transaction only; in steps of 64, as ever. The clock is in it, since setseed() makes
-- random() begin anew. Nobody uses the sequence any more.
alter table cdc.outbox alter id
    set default ((random() * 4503599627370496)::bigint # (date_part('epoch', clock_timestamp()) * 1000000)::bigint) << 6;
