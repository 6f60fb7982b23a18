"""The worker's own functions in Convex, with their arguments and the form of their answers: docs/protocol.md."""

import json
from collections.abc import Awaitable, Sequence
from typing import Any, Literal, TypeVar

from convex.values import convex_to_json
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from cdc_worker.deployment import Deployment, Kind
from cdc_worker.errors import FunctionFailed, Misconfigured
from cdc_worker.mirrors import Mirror
from cdc_worker.outbox import Shard
from convex import ConvexError

T = TypeVar("T")


class Epoch(BaseModel):
    """A shard's, as it is handed out, and what was before."""

    deployment: str
    epoch: int = Field(gt=0, le=2**53)
    previous: int | None
    # Under `previous`: as far as Convex was told.
    previousSaves: int  # noqa: N815  # as Convex says it


class _Rejected(TypedDict):
    rejected: str


Verdict = Literal["applied", "unchanged", "deleted", "stale"] | _Rejected


class _Applied(TypedDict):
    outcome: Literal["applied"]
    verdicts: list[Verdict]


class _Fenced(TypedDict):
    outcome: Literal["fenced"]
    epoch: float | None


_EPOCH = TypeAdapter(Epoch)
_OUTCOME: TypeAdapter[_Applied | _Fenced] = TypeAdapter(_Applied | _Fenced)
_SAVES: TypeAdapter[int | None] = TypeAdapter(int | None)
_KEYS = TypeAdapter(list[str])
_DEPLOY = "deploy the convex/ folder of this worker's version"


class Functions:
    """For the reader of one shard. All raise Transient and Misconfigured: outage.py insists."""

    def __init__(self, deployment: Deployment, shard: Shard) -> None:
        self._deployment = deployment
        self._shard = shard.name
        self._shards = shard.of

    async def open(self, reader: str, *, at_least: int, saves: int) -> Epoch:
        args = {"shard": self._shard, "shards": self._shards, "reader": reader, "atLeast": at_least, "saves": saves}
        return await _unrefused(self._ask("mutation", "cdc:open", args, _EPOCH))

    async def note_saves(self, epoch: int, saves: int) -> int | None:
        """Tells how often the checkpoint was saved: never more than Postgres knows, unless that is set back.

        Returns what Convex was told before; None if the shard has another epoch now.
        """
        args = {"shard": self._shard, "epoch": epoch, "saves": saves}
        return await _unrefused(self._ask("mutation", "cdc:noteSaves", args, _SAVES))

    async def apply(self, epoch: int, events: Sequence[bytes]) -> list[Verdict] | None:
        """`events`: JSON texts. Returns None if the shard has another epoch. Raises FunctionFailed: then `probe`."""
        head = json.dumps({"shard": self._shard, "epoch": float(epoch)})[:-1].encode()
        args = b'%s,"events":[%s]}' % (head, b",".join(events))
        answer = await self._ask("mutation", "cdc:apply", args, _OUTCOME)
        if answer["outcome"] == "fenced":
            return None
        if len(answer["verdicts"]) != len(events):
            raise Misconfigured(f"cdc:apply gave another number of verdicts: {_DEPLOY}")
        return answer["verdicts"]

    async def probe(self, epoch: int) -> None:
        """Passes exactly if the deployment is well: then what was refused is at fault."""
        await _unrefused(self.apply(epoch, ()))

    async def keys(self, mirror: Mirror, after: str | None, limit: int) -> list[str]:
        while limit > 1:
            try:
                return await self._keys(mirror, after, limit)
            except FunctionFailed:
                # Whole documents are read to list their keys: large ones may take more time than a query has.
                limit = max(limit // 4, 1)
        return await _unrefused(self._keys(mirror, after, limit))

    async def _keys(self, mirror: Mirror, after: str | None, limit: int) -> list[str]:
        args = {"mirror": mirror.name, "target": mirror.target, "after": after, "limit": limit}
        return await self._ask("query", "cdc:keys", args, _KEYS)

    async def _ask(self, kind: Kind, path: str, args: dict[str, Any] | bytes, form: TypeAdapter[T]) -> T:
        text = args if isinstance(args, bytes) else json.dumps(convex_to_json(args)).encode()
        try:
            return form.validate_python(await self._deployment.send(kind, path, text))
        except ConvexError as failure:
            raise FunctionFailed(str(failure)) from None
        except ValidationError:
            raise Misconfigured(f"{path} gave an answer of another form: {_DEPLOY}") from None


async def _unrefused(answer: Awaitable[T]) -> T:
    """The answer of a call whose arguments are never at fault: if it fails, something is wrong with all of Convex."""
    try:
        return await answer
    except FunctionFailed as failure:
        raise Misconfigured(
            f"{failure}: is the deployment running, and has it the functions of this worker's convex/ folder?"
        ) from None
