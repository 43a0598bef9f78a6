"""Sessions of a server's clients: each bound to the API key that made it."""

import asyncio
import collections
import contextlib
import hashlib
import hmac
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from megalodon_jax.errors import SessionError
from megalodon_jax.inference.sessions import Session
from megalodon_jax.serve.errors import ApiError

NEW = "new"
"""The value of the field `session` that begins one."""
_ID = re.compile(r"[0-9a-f]{32}")


class _Key(NamedTuple):
    owner: str
    id: str


class Lease:
    """A session while a call uses it.

    Attributes:
      id: 32 hexadecimal digits, 128 random bits.
      session: the state to continue; None: the session is new.
      result: the state that replaces it at the end; None: it stays as it is.
    """

    def __init__(self, id: str, session: Session | None):
        self.id, self.session = id, session
        self.result: Session | None = None


class SessionStore:
    """Keeps sessions in memory, the least recently used ones dropped beyond a limit.

    With a directory every session is a file, whose name is an HMAC of the id under the owner's key:
    the files' names give no ids, and another owner's id names no file.

    Args:
      max_sessions: most sessions in memory.
      directory: of files; None: sessions end with the server.
      load: reads a file; `EngineThread.load_session`.
    """

    def __init__(
        self,
        max_sessions: int,
        directory: Path | None,
        load: Callable[[Path], Awaitable[Session]],
    ):
        self._max_sessions, self._directory, self._load = max_sessions, directory, load
        self._sessions: collections.OrderedDict[_Key, Session] = collections.OrderedDict()
        self._in_use: set[_Key] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    @contextlib.asynccontextmanager
    async def lease(self, id: str, owner: str) -> AsyncIterator[Lease]:
        """A session for one call, stored again at the end with the call's result.

        Args:
          id: of the session, or "new".
          owner: what identifies the API key.

        Raises:
          ApiError: 404: this owner has no such session; 409: another call uses it.
        """
        key = _Key(owner, secrets.token_hex(16) if id == NEW else id)
        if key in self._in_use:
            raise ApiError(
                409, "another call uses this session; wait for its end", param="session",
                code="session_in_use",
            )  # fmt: skip
        self._in_use.add(key)
        try:
            lease = Lease(key.id, None if id == NEW else await self._find(key))
            yield lease
            if lease.result is not None:
                await self._store(key, lease.result)
        finally:
            self._in_use.discard(key)

    async def _find(self, key: _Key) -> Session:
        if (session := self._sessions.get(key)) is not None:
            self._sessions.move_to_end(key)
            return session
        file = self._file(key)
        if _ID.fullmatch(key.id) is None or file is None or not file.is_file():
            raise ApiError(
                404, "there is no such session; begin one with \"session\": \"new\"",
                param="session", code="session_not_found",
            )  # fmt: skip
        try:
            session = await self._load(file)
        except SessionError as error:
            raise ApiError(
                404, f"the session cannot be continued: {_without_path(error, file)}",
                param="session", code="session_not_found",
            ) from error  # fmt: skip
        self._keep(key, session)
        return session

    async def _store(self, key: _Key, session: Session) -> None:
        self._keep(key, session)
        if (file := self._file(key)) is not None:
            await asyncio.to_thread(session.save, file)

    def _keep(self, key: _Key, session: Session) -> None:
        self._sessions[key] = session
        self._sessions.move_to_end(key)
        while len(self._sessions) > self._max_sessions:
            self._sessions.popitem(last=False)

    def _file(self, key: _Key) -> Path | None:
        if self._directory is None:
            return None
        name = hmac.new(key.owner.encode(), key.id.encode(), hashlib.sha256).hexdigest()
        return self._directory / f"{name}.session"


def _without_path(error: SessionError, file: Path) -> str:
    return str(error).replace(str(file), "its file")
