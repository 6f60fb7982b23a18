"""The mirrors at work: cdc_worker.toml as the database knows it, each with a plan or with what is wrong with it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import psycopg
import structlog

from cdc_worker.catalog import check
from cdc_worker.database import Connection, Database
from cdc_worker.errors import ConfigError, SchemaError
from cdc_worker.mirrors import Mirror
from cdc_worker.outbox import mark, ring
from cdc_worker.parking import Parking
from cdc_worker.plan import Plan
from cdc_worker.postgres_errors import LOCKED, cause, first_lines, is_of_the_query, is_surely_gone, try_key
from cdc_worker.schema import load_migrations

log = structlog.get_logger()

_VERSION = "select max(number) from cdc.migration"
_MIRRORS = "select id, name, definition, configured from cdc.mirror"
# The worker keeps the file that it was started with.
_CURE = "its keys are parked until the query runs: mend it in cdc_worker.toml, run migrate, restart the worker"


@dataclass
class MirrorState:
    """A mirror at work: its plan, or why there is none."""

    id: int
    name: str
    plan: Plan | None
    # What is wrong with the query; "" while there is a plan.
    broken: str = ""
    # No longer in cdc_worker.toml: what the log still says of it is passed over (`migrate` said so).
    retired: bool = False

    def breaks(self, said: str) -> None:
        if not self.broken:
            log.error("mirror.broken", mirror=self.name, cause=said, cure=_CURE)
        self.plan, self.broken = None, said


class Registry:
    """By the small number that the log uses."""

    def __init__(self, database: Database, config: Sequence[Mirror], parking: Parking) -> None:
        self._database = database
        self._config = {mirror.name: mirror for mirror in config}
        self._parking = parking
        self.states: dict[int, MirrorState] = {}

    async def load(self) -> None:
        """Reads what `migrate` noted. Raises SchemaError as `known_mirrors` does."""
        for name, number in (await known_mirrors(self._database, self._config.values())).items():
            self.states[number] = MirrorState(number, name, None, retired=name not in self._config)
        await self.mend()

    @property
    def broken(self) -> bool:
        return any(state.plan is None and not state.retired for state in self.states.values())

    @property
    def plans(self) -> dict[int, Plan]:
        """Of the mirrors whose query runs."""
        return {state.id: state.plan for state in self.states.values() if state.plan is not None}

    async def mend(self) -> None:
        """Gives each mirror without a plan its plan if its query runs, and its parked keys a new try."""
        failed: list[tuple[MirrorState, psycopg.Error]] = []
        for state in self.states.values():
            if state.plan is None and not state.retired:
                failure = await self._try_plan(state, self._config[state.name])
                if failure is not None:
                    failed.append((state, failure))
        for state, failure in failed:
            if not self.plans:
                raise failure  # no mirror's query runs: it is the database
            state.breaks(cause(failure))

    async def note_parked(self, keys: Collection[tuple[int, str]]) -> None:
        """These were read when their mirror was broken, and have just been parked for it: too late for its mending, if
        Convex was away meanwhile. Then they are read anew.
        """
        late = [(mirror_id, key) for mirror_id, key in keys if self.states[mirror_id].plan is not None]
        if not late:
            return
        async with self._database.transaction() as connection:
            for mirror_id in {mirror_id for mirror_id, _ in late}:
                await mark(connection, mirror_id, [key for of, key in late if of == mirror_id])
        await ring(self._database)

    async def _try_plan(self, state: MirrorState, mirror: Mirror) -> psycopg.Error | None:
        """Returns what may be the query's fault, or the database's."""
        try:
            async with self._database.transaction("read only") as connection:
                plan = await check(connection, mirror)
                if state.broken:
                    await self._try_key(connection, state, plan)
        except (ConfigError, *LOCKED) as error:
            # Whatever is locked may stay so for hours, and other mirrors have nothing to do with it.
            state.breaks(first_lines(error) if isinstance(error, psycopg.Error) else str(error))
            return None
        except psycopg.Error as error:
            if is_surely_gone(error):
                raise
            return error
        was_broken = bool(state.broken)
        state.plan, state.broken = plan, ""
        await self._parking.retry_mirror(state.id)
        if was_broken:
            log.info("mirror.mended", mirror=mirror.name)
        return None

    async def _try_key(self, connection: Connection, state: MirrorState, plan: Plan) -> None:
        """What no plan shows: a function that fails when it is called. Raises ConfigError if it still does."""
        key = await self._parking.one_of_mirror(state.id)
        if key is None:
            return
        try:
            await try_key(connection, plan, key)
        except psycopg.Error as error:
            if is_surely_gone(error):
                raise
            if await is_of_the_query(error, connection, plan, [key]):
                raise ConfigError(cause(error)) from None


async def known_mirrors(database: Database, config: Collection[Mirror]) -> dict[str, int]:
    """By name, the number of each mirror that `migrate` ever noted.

    Raises SchemaError if it has not run, or not with this configuration.
    """
    try:
        ((version,),) = await database.execute(_VERSION)
        known = await database.execute(_MIRRORS)
    except psycopg.errors.UndefinedTable:
        raise SchemaError("this database has no schema cdc: run `cdc-worker migrate`") from None
    if version != load_migrations()[-1].number:
        raise SchemaError(f"the database has migration {version}: run `cdc-worker migrate` of this worker's version")
    definitions = {name: definition for _, name, definition, configured in known if configured}
    for mirror in config:
        if definitions.pop(mirror.name, None) != mirror.definition:
            raise SchemaError(f'mirror "{mirror.name}" is not as the database knows it: run `cdc-worker migrate`')
    # Another worker's file, or an older one: the changes of such a mirror would be passed over, and lost to it.
    if definitions:
        raise SchemaError(
            f'the database has mirror "{min(definitions)}", and this cdc_worker.toml lacks it: start with the file that'
            " `cdc-worker migrate` had last, or run that with this one, which retires the mirror"
        )
    return {name: number for number, name, _, _ in known}
