"""Records in the bucket: append-ordered pages of JSON objects that every change replaces with a conditional write.

The records of one kind and project are stored in pages of 40, `<prefix>/<999999999 - number>.json`, so that the newest page
is listed first. An id contains the number of its page and the record's place in it. So a record is read with one request, and
a list of 20 with at most four, however many records exist. A list that selects records may read all pages, 16 at a time. A
page is changed by reading it and replacing it only if its ETag is still the same.
"""

import json
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

from utils.storage.bucket import AlreadyExistsError, BucketError, ChangedError
from utils.storage.s3 import S3Store

PAGE_RECORDS = 40
_LAST_PAGE = 999_999_999
_GIVE_UP_SECONDS = 60.0
_PAGES_AT_A_TIME, _SINGLE_PAGES = 16, 2
"""Pages that a list reads at the same time, and pages that it reads one by one after those that it certainly needs."""

Record = dict[str, Any]


class ContentionError(BucketError):
    """An error for a record that other processes kept changing."""


@dataclass(frozen=True)
class Slice:
    """Part of a list of records."""

    records: list[Record]
    has_more: bool


class Records:
    """The records of one kind, below a prefix of a store."""

    def __init__(self, store: S3Store, prefix: str, id_prefix: str):
        """Set the location.

        Args:
            store: The bucket prefix of the service.
            prefix: Location of the pages in the store.
            id_prefix: Begin of every id, such as `file-`.
        """
        self._store, self._prefix, self._id_prefix = store, prefix, id_prefix
        self._id = re.compile(rf"{re.escape(id_prefix)}([0-9a-f]{{7}})([0-9a-f]{{4}})[0-9a-f]{{13}}")

    def get(self, identifier: str) -> Record | None:
        """Return a record, or None."""
        number = self._page_of(identifier)
        return None if number is None else _find(self._read(number)[0], identifier)

    def is_id(self, identifier: str) -> bool:
        """Return whether a record may have this id, or may have had it."""
        return self._page_of(identifier) is not None

    def get_many(self, identifiers: Sequence[str]) -> dict[str, Record]:
        """Return the records that exist, by id, with one request per page."""
        numbers = {number for each in identifiers if (number := self._page_of(each)) is not None}
        found = {record["id"]: record for number in numbers for record in self._read(number)[0]}
        return {each: found[each] for each in identifiers if each in found}

    def append(
        self,
        make: Callable[[str], Record],
        existing: Callable[[Record], bool] | None = None,
        since: float = 0,
    ) -> Record:
        """Add a record and return it.

        Args:
            make: Returns the record for a new id.
            existing: Returns whether a record is the same as the new one. A record that is the same is returned instead, also
                if another process adds it at the same moment.
            since: Creation time of the oldest record that may be the same.
        """
        for _ in _attempts():
            number = self._newest()
            records, etag = self._read(number) if number is not None else ([], None)
            for record in self._created_since(since, number, records) if existing else ():
                if existing and existing(record):
                    return record
            if number is None or len(records) >= PAGE_RECORDS:
                number, records, etag = (0 if number is None else number + 1), [], None
            record = make(self._new_id(number, records))
            if self._write(number, [*records, record], etag):
                return record
        raise self._contention()

    def reserve(self) -> str:
        """Return an id for `insert`."""
        number = self._newest()
        if number is None:
            self._write(0, [], None)
        return self._new_id(number or 0, self._read(number or 0)[0])

    def insert(self, record: Record) -> None:
        """Add a record with a reserved id, unless it exists already."""
        number = self._page_of(record["id"])
        assert number is not None
        for _ in _attempts():
            records, etag = self._read(number)
            if _find(records, record["id"]) or self._write(number, [*records, record], etag):
                return
        raise self._contention()

    def update(self, identifier: str, change: Callable[[Record], Record | None]) -> Record | None:
        """Change a record and return the result; None if it does not exist.

        Args:
            identifier: Id of the record.
            change: Returns the new record, or None to leave it unchanged. May be called more than once.
        """
        number = self._page_of(identifier)
        if number is None:
            return None
        for _ in _attempts():
            records, etag = self._read(number)
            record = _find(records, identifier)
            if record is None or (changed := change(record)) is None or changed == record:
                return record
            updated = [changed if each["id"] == identifier else each for each in records]
            if self._write(number, updated, etag):
                return changed
        raise self._contention()

    def remove(self, identifier: str) -> Record | None:
        """Remove a record and return it; None if it does not exist."""
        number = self._page_of(identifier)
        if number is None:
            return None
        for _ in _attempts():
            records, etag = self._read(number)
            record = _find(records, identifier)
            if record is None:
                return None
            if self._write(number, [each for each in records if each["id"] != identifier], etag):
                return record
        raise self._contention()

    def slice(
        self,
        *,
        after: str | None,
        limit: int,
        ascending: bool = False,
        wanted: Callable[[Record], bool] = lambda record: True,
    ) -> Slice | None:
        """Return up to `limit` records after an id, newest first or oldest first; None if that id has never existed.

        Args:
            after: Id of the last record of the slice before; it may have been removed.
            limit: Number of records.
            ascending: Oldest first.
            wanted: Selects records.
        """
        first = None if after is None else self._page_of(after)
        if after is not None and first is None:
            return None
        newest = self._newest() if ascending or first is None else first
        if newest is None:
            return Slice([], False)
        numbers = range(first or 0, newest + 1) if ascending else range(newest, -1, -1)
        found: list[Record] = []
        for page in self._pages(numbers, needed=limit // PAGE_RECORDS + 1):
            # `insert` and `append` may give two records the same place, so the id decides between them.
            records = sorted(page, key=lambda record: self._order_of(record["id"]))[:: numbers.step]
            if after is not None:
                order, after = self._order_of(after), None
                records = [
                    each
                    for each in records
                    if (
                        self._order_of(each["id"]) > order
                        if ascending
                        else self._order_of(each["id"]) < order
                    )
                ]
            found += [record for record in records if wanted(record)]
            if len(found) > limit:
                break
        return Slice(found[:limit], len(found) > limit)

    def _pages(self, numbers: range, needed: int) -> Iterator[list[Record]]:
        """Yield the records of pages; several are read at a time where the caller probably needs all of them.

        Args:
            numbers: The pages. The first one that does not exist ends them.
            needed: Pages that the caller certainly needs. After two more, it is looking for rare records.
        """

        def read(number: int) -> bytes | None:
            return self._store.read_if_exists(self._key(number))

        done = 0
        with ThreadPoolExecutor(_PAGES_AT_A_TIME, thread_name_prefix="pages") as pool:
            while done < len(numbers):
                count = _PAGES_AT_A_TIME
                if done < needed:
                    count = min(count, needed - done)
                elif done < needed + _SINGLE_PAGES:
                    count = 1
                for page in pool.map(read, numbers[done : done + count]):
                    if page is None:
                        return
                    yield json.loads(page)
                done += count

    def _created_since(self, since: float, number: int | None, newest: list[Record]) -> Iterator[Record]:
        """Yield the records that were created since a time, and the others of their pages, the newest page first."""
        for page in chain([newest], self._pages(range((number or 0) - 1, -1, -1), needed=0)):
            yield from reversed(page)
            if page and max(record["created_at"] for record in page) < since:
                return

    def _newest(self) -> int | None:
        found = self._store.first(f"{self._prefix}/")
        return None if found is None else _LAST_PAGE - int(found.key.rpartition("/")[2].partition(".")[0])

    def _key(self, number: int) -> str:
        return f"{self._prefix}/{_LAST_PAGE - number:09d}.json"

    def _new_id(self, number: int, records: list[Record]) -> str:
        place = max((self._place_of(record["id"]) for record in records), default=0) + 1
        return f"{self._id_prefix}{number:07x}{place:04x}{secrets.token_hex(7)[:13]}"

    def _place_of(self, identifier: str) -> int:
        match = self._id.fullmatch(identifier)
        return int(match[2], 16) if match else 0

    def _order_of(self, identifier: str) -> tuple[int, str]:
        return self._place_of(identifier), identifier

    def _page_of(self, identifier: str) -> int | None:
        match = self._id.fullmatch(identifier)
        return int(match[1], 16) if match else None

    def _read(self, number: int) -> tuple[list[Record], str | None]:
        found = self._store.read_version(self._key(number))
        return ([], None) if found is None else (json.loads(found[0]), found[1])

    def _write(self, number: int, records: list[Record], etag: str | None) -> bool:
        """Write a page; return false if another process has changed it."""
        content = json.dumps(records).encode()
        try:
            if etag is None:
                self._store.write(self._key(number), content, only_if_absent=True)
            else:
                self._store.write_version(self._key(number), content, etag)
        except (AlreadyExistsError, ChangedError):
            return False
        return True

    def _contention(self) -> ContentionError:
        return ContentionError(
            f"{self._store.uri_of(self._prefix)}: other processes changed these records for {_GIVE_UP_SECONDS:.0f} s; try again"
        )


def _find(records: list[Record], identifier: str) -> Record | None:
    return next((record for record in records if record["id"] == identifier), None)


def _attempts() -> Iterator[int]:
    """Yield numbers of attempts, with a random delay before each repetition."""
    until, number = time.monotonic() + _GIVE_UP_SECONDS, 0
    while number == 0 or time.monotonic() < until:
        yield number
        number += 1
        time.sleep(random.uniform(0, min(0.5, 0.01 * 2**number)))
