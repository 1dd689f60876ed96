"""A simulated object store as an fsspec filesystem, `sim://`, that fails and delays as a seed determines."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fsspec

from tests.simulation.primitives import scheduler


class ServiceUnavailable(OSError):
    """A temporary failure, such as an answer 503."""


@dataclass
class Faults:
    """How storage fails.

    Attributes:
        until_s: When it works again.
        rate: Probability that a request fails before it has an effect.
        lost_answer_rate: Probability that a request has an effect, but its answer is lost.
        listing_delay_s: The longest time after which new objects are listed.
        tears: Whether a killed process leaves a part of the object that it was writing.
    """

    until_s: float = 0.0
    rate: float = 0.0
    lost_answer_rate: float = 0.0
    listing_delay_s: float = 0.0
    tears: bool = False


class Store:
    """The objects, by path, and when they are listed from."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.objects: dict[str, bytes] = {}
        self.listed_from: dict[str, float] = {}
        self.on_write: Callable[[str], None] = lambda path: None

    def request(self, change: Any = None) -> Any:
        """Make a request: wait, fail or have an effect, and wait again."""
        current, faults = scheduler(), self.faults
        fails = current.now < faults.until_s
        current.sleep(current.random.uniform(0.0, 0.02))
        if fails and current.random.random() < faults.rate:
            raise ServiceUnavailable("503 Slow Down")
        value = None if change is None else change()
        current.sleep(current.random.uniform(0.0, 0.01))
        if fails and current.random.random() < faults.lost_answer_rate:
            raise ServiceUnavailable("503 after the request was applied")
        return value

    def write(self, path: str, data: bytes) -> None:
        """Store an object."""
        current = scheduler()
        if self.faults.tears and data:
            self.request(lambda: self._set(path, data[: current.random.randrange(len(data))]))
        self.request(lambda: self._set(path, data))

    def _set(self, path: str, data: bytes) -> None:
        current = scheduler()
        if path not in self.objects:
            self.listed_from[path] = current.now + current.random.uniform(0.0, self.faults.listing_delay_s)
        self.objects[path] = data
        self.on_write(path)
        current.note(f"{current.process.name} writes {path}, {len(data)} bytes")

    def remove(self, path: str) -> None:
        """Remove an object."""

        def pop() -> None:
            if self.objects.pop(path, None) is None:
                raise FileNotFoundError(path)
            scheduler().note(f"{scheduler().process.name} removes {path}")

        self.request(pop)


_stores: list[Store] = []


def use(store: Store) -> None:
    """Set the store of the current simulation."""
    _stores[:] = [store]


class SimulatedFileSystem(fsspec.AbstractFileSystem):
    """Objects by path; a folder exists as long as it contains one."""

    protocol = "sim"
    cachable = False
    root_marker = ""

    def exists(self, path: str, **options: Any) -> bool:
        path = self._strip_protocol(path)
        return bool(_stores[-1].request(lambda: self._is_file(path) or self._is_folder(path)))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        objects = _stores[-1].objects
        _stores[-1].request()
        if path in objects:
            return {"name": path, "size": len(objects[path]), "type": "file"}
        if self._is_folder(path):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        path = self._strip_protocol(path)
        store = _stores[-1]

        def names() -> dict[str, bool]:
            now, found = scheduler().now, {}
            for name in store.objects:
                if name.startswith(f"{path}/") and store.listed_from[name] <= now:
                    first, _, rest = name[len(path) + 1 :].partition("/")
                    found[f"{path}/{first}"] = bool(rest)
            return found

        found = store.request(names)
        if not found:
            raise FileNotFoundError(path)
        if not detail:
            return sorted(found)
        return [
            {"name": name, "size": 0, "type": "directory" if is_folder else "file"}
            for name, is_folder in sorted(found.items())
        ]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        path = self._strip_protocol(path)

        def read() -> bytes:
            if not self._is_file(path):
                raise FileNotFoundError(path)
            return _stores[-1].objects[path][start:end]

        return bytes(_stores[-1].request(read))

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        _stores[-1].write(self._strip_protocol(path), value)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        with open(lpath, "rb") as file:
            data = file.read()
        _stores[-1].write(self._strip_protocol(rpath), data)

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        data = self.cat_file(rpath)
        with open(lpath, "wb") as file:
            file.write(data)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            return io.BytesIO(self.cat_file(path))
        return _Writer(path)

    def rm_file(self, path: str) -> None:
        _stores[-1].remove(self._strip_protocol(path))

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        path = self._strip_protocol(path)
        names = [name for name in _stores[-1].objects if name == path or (recursive and name.startswith(f"{path}/"))]
        if not names:
            raise FileNotFoundError(path)
        scheduler().random.shuffle(names)
        for name in names:
            _stores[-1].remove(name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def _is_file(self, path: str) -> bool:
        return path in _stores[-1].objects

    def _is_folder(self, path: str) -> bool:
        return any(name.startswith(f"{path}/") for name in _stores[-1].objects)


class _Writer(io.BytesIO):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            _stores[-1].write(SimulatedFileSystem._strip_protocol(self._path), data)


fsspec.register_implementation("sim", SimulatedFileSystem, clobber=True)
