"""Checkpoints on file systems that are not mounted, store and format alone: what is cut off harms nothing."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from helpers.cases import case
from helpers.object_store import ObjectStore, use_folder

from lightning_tex.errors import UserError
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.topology import Axis
from lightning_tex.saving import CorruptCheckpointError, SideGroup, at, latest, paths, pointer, retrying, store_of
from lightning_tex.saving.disk import require_writable
from lightning_tex.saving.global_tensor import GlobalTensor
from lightning_tex.saving.newest import Place, Search, find
from lightning_tex.saving.reading import Directory
from lightning_tex.saving.remote_path import RemotePath
from lightning_tex.saving.remote_store import RemoteStore
from lightning_tex.saving.writing import begin

WORLD = Axis("world")
LAYOUT = Layout(1, 1, 1)


class Killed(BaseException):
    """In the place of a signal: nothing of the save goes on."""


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "FIRST_WAIT_S", 0)
    use_folder(tmp_path / "objects")
    monkeypatch.setattr(ObjectStore, "before", staticmethod(lambda request, key: None))


def values(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(60.0).reshape(3, 20) + step, "scale": torch.tensor(float(step))}


def save(url: str, step: int, linked: bool = False) -> None:
    tensors = {"model": {name: GlobalTensor.whole(value) for name, value in values(step).items()}}
    trainer_state = {"global_step": step, "lr_schedulers": [], "optimizer_states": []}
    begin(at(url), linked, tensors, trainer_state, LAYOUT, WORLD, lambda value: value).finish(SideGroup(WORLD, None))


def read(url: str) -> tuple[int, dict[str, torch.Tensor]]:
    directory = Directory.verified(find(at(url)))
    return directory.manifest.step, {name[1]: value for name, value in directory.whole()}


def holds(url: str, step: int) -> bool:
    found, tensors = read(url)
    return found == step and all(torch.equal(tensors[name], value) for name, value in values(step).items())


def keys() -> list[str]:
    return sorted(ObjectStore()._sizes())


def requests_of(act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a save asks the store to change."""
    seen: list[str] = []
    monkeypatch.setattr(ObjectStore, "before", staticmethod(lambda request, key: seen.append(request)))
    act()
    return seen


def killed_at(number: int, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(1, number + 1))

    def counted(request: str, key: str) -> None:
        if next(count) == number:
            raise Killed

    monkeypatch.setattr(ObjectStore, "before", staticmethod(counted))
    with pytest.raises(Killed):
        act()
    monkeypatch.setattr(ObjectStore, "before", staticmethod(lambda request, key: None))


@pytest.mark.parametrize("url", ["objects://bucket/run", "memory://run"])
def test_a_name_is_a_small_file_that_leads_to_a_complete_directory(url: str) -> None:
    save(f"{url}/a.ckpt", 1)
    save(f"{url}/a.ckpt", 2)
    save(f"{url}/last.ckpt", 3, linked=True)
    assert holds(f"{url}/a.ckpt", 2) and holds(f"{url}/last.ckpt", 3)
    visible = {path.name for path in at(url).iterdir() if not path.name.startswith(".")}
    assert visible == {"a.ckpt", "last.ckpt"}
    assert len(list(at(url).iterdir())) == 4  # what was replaced is gone
    assert at(f"{url}/a.ckpt").size() < pointer.MOST_BYTES
    assert latest(url) == at(f"{url}/last.ckpt")
    store_of(at(url)).remove(at(f"{url}/last.ckpt"))
    assert latest(url) == at(f"{url}/a.ckpt")
    store_of(at(url)).remove(at(f"{url}/a.ckpt"))
    assert not fsspec.url_to_fs(url)[0].find(url)


@pytest.mark.parametrize("name", ["a.ckpt", "b.ckpt"])
def test_a_save_that_is_cut_off_anywhere_leaves_the_one_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "objects://bucket/run"
    act = functools.partial(save, f"{url}/{name}", 2)
    save(f"{url}/a.ckpt", 1)
    steps = requests_of(act, monkeypatch)
    assert steps.count("put") == 6  # elements, three tables, manifest, name
    for number in range(1, len(steps) + 1):
        with case(number=number):
            for key in keys():
                ObjectStore().rm_file(key)
            save(f"{url}/a.ckpt", 1)
            killed_at(number, act, monkeypatch)
            newest = latest(url)
            # With its manifest it is complete; a new name need not even be put.
            complete = number > (6 if name == "a.ckpt" else 5)
            assert newest is not None
            assert holds(str(newest), 2 if complete else 1)
            assert not list(damaged(url))
            assert holds(f"{url}/a.ckpt", 2 if name == "a.ckpt" and number > 6 else 1)
            save(f"{url}/{name}", 3)
            assert holds(f"{url}/{name}", 3)
            assert len({key.rpartition("/")[0] for key in keys()}) == 1 + (1 if name == "a.ckpt" else 2)


def damaged(url: str) -> Iterator[str]:
    search = Search([Place(at(url))])
    list(search)
    yield from search.damaged


def test_a_removal_that_is_cut_off_leaves_nothing_that_is_half(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "objects://bucket/run"
    save(f"{url}/a.ckpt", 1)
    act = functools.partial(store_of(at(url)).remove, at(f"{url}/a.ckpt"))
    total = len(requests_of(act, monkeypatch))
    for number in range(1, total + 1):
        with case(number=number):
            save(f"{url}/a.ckpt", 1)
            killed_at(number, act, monkeypatch)
            newest = latest(url)
            assert newest is None or holds(str(newest), 1)
            assert (newest is None) == (number > 2)  # without its name it is complete, without its manifest gone
            assert not list(damaged(url))


def test_a_changed_byte_is_refused_and_the_one_before_is_named() -> None:
    url = "objects://bucket/run"
    save(f"{url}/a.ckpt", 1)
    save(f"{url}/b.ckpt", 2)
    directory = at(f"{url}/b.ckpt").resolve()
    for name in (path.name for path in directory.iterdir()):
        with case(name):
            whole = (directory / name).read_bytes()
            for changed in (whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:], whole[:-1], whole + b" "):
                (directory / name).write_bytes(changed)
                with pytest.raises(CorruptCheckpointError, match="expected") as raised:
                    read(f"{url}/b.ckpt")
                assert f"{directory}/{name}" in str(raised.value)
                assert f"The newest complete whole state there is {url}/a.ckpt" in str(raised.value)
            (directory / name).unlink()
            with pytest.raises(CorruptCheckpointError, match="found none"):
                read(f"{url}/b.ckpt")
            (directory / name).write_bytes(whole)
    assert holds(f"{url}/b.ckpt", 2)


def test_a_pointer_that_is_changed_or_leads_away_leads_nowhere() -> None:
    url = "objects://bucket/run"
    save(f"{url}/a.ckpt", 1)
    name = at(f"{url}/a.ckpt")
    text = name.read_bytes()
    for changed in (text.replace(b".a.ckpt", b".b.ckpt"), text[:-2], pointer.to_bytes("../elsewhere")):
        name.write_bytes(changed)
        assert name.resolve() == name
        assert latest(url) is None
        assert len(list(damaged(url))) == 1
    name.write_bytes(text)
    assert holds(f"{url}/a.ckpt", 1)


def test_requests_that_fail_are_repeated_with_growing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retrying, "FIRST_WAIT_S", 0.5)
    monkeypatch.setattr(retrying.time, "sleep", waits.append)
    failing = {"left": 3}

    def fails(request: str, key: str) -> None:
        if key.endswith("manifest.json") and failing["left"]:
            failing["left"] -= 1
            raise TimeoutError("no answer")

    monkeypatch.setattr(ObjectStore, "before", staticmethod(fails))
    save("objects://bucket/run/a.ckpt", 1)
    assert holds("objects://bucket/run/a.ckpt", 1)
    assert len(waits) == 3 and all(0.5 * 2**n * 0.5 <= wait <= 0.5 * 2**n * 1.5 for n, wait in enumerate(waits))
    failing["left"] = retrying.ATTEMPTS
    with pytest.raises(UserError, match=f"TimeoutError: no answer, in {retrying.ATTEMPTS} attempts"):
        save("objects://bucket/run/b.ckpt", 2)
    assert holds("objects://bucket/run/a.ckpt", 1)
    assert not [key for key in keys() if "b.ckpt" in key]


def test_what_no_attempt_could_mend_is_raised_at_once() -> None:
    calls: list[int] = []

    def refused() -> None:
        calls.append(1)
        raise PermissionError("not yours")

    with pytest.raises(PermissionError, match="not yours"):
        retrying.repeated(refused, "a request")
    assert calls == [1]


def test_elements_are_put_in_files_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteStore, "part_bytes", 50)
    url = "objects://bucket/run/a.ckpt"
    save(url, 4)
    assert holds(url, 4)
    manifest = Directory.verified(at(url)).manifest
    parts = [name for name in manifest.files if name.endswith(".distcp")]
    # Of 3 rows of 20 six halves, 40 bytes each, and one element more.
    assert set(parts) == {f"__0_{number}.distcp" for number in range(6)}
    index = Directory(at(url), manifest).saved.values()
    assert max(4 * stored.extent.numel for record in index for stored in record.extents) <= 50
    assert sum(stored.extent.numel for record in index for stored in record.extents) == 61


def test_a_read_asks_for_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "objects://bucket/run/a.ckpt"
    save(url, 5)
    asked: list[tuple[Any, Any]] = []
    whole = ObjectStore.cat_file

    def noted(self: ObjectStore, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        if path.endswith(".distcp"):
            asked.append((start, end))
        return whole(self, path, start, end, **options)

    directory = Directory.verified(at(url))
    monkeypatch.setattr(ObjectStore, "cat_file", noted)
    directory.fill({("model", "scale"): GlobalTensor.whole(torch.empty(()))})
    assert [end - start for start, end in asked] == [4]


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = at("objects://bucket/run")
    require_writable([folder], True, WORLD, lambda value: value)
    assert not keys()

    def refused(request: str, key: str) -> None:
        raise PermissionError(13, "Access denied")

    monkeypatch.setattr(ObjectStore, "before", staticmethod(refused))
    with pytest.raises(UserError, match=f"rank 0: {folder}: Access denied"):
        require_writable([folder], True, WORLD, lambda value: value)


def test_names_are_those_of_pathlib() -> None:
    path = at("s3://bucket/run/step=2.ckpt/")
    assert isinstance(path, RemotePath)
    assert (str(path), path.name, path.suffix) == ("s3://bucket/run/step=2.ckpt", "step=2.ckpt", ".ckpt")
    assert str(path.parent.parent.parent) == "s3://"
    assert str(at("memory://run") / "a") == "memory://run/a"
    assert at("file:///tmp/a b") == at("/tmp/a b") == Path("/tmp/a b")
    assert paths.stands_for(paths.hidden(path)) == path


class Files(BaseHTTPRequestHandler):
    """Sends files of a folder, and ranges of them if it is to."""

    folder: Path
    ranges: bool

    def do_GET(self) -> None:
        file = self.folder / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        content, code = file.read_bytes(), 200
        if self.ranges and (asked := self.headers.get("Range")):
            first, last = asked.removeprefix("bytes=").split("-")
            content, code = content[int(first) : int(last) + 1], 206
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing to say."""


@pytest.mark.parametrize("ranges", [True, False])
def test_a_directory_is_read_from_a_web_server(tmp_path: Path, ranges: bool) -> None:
    pytest.importorskip("aiohttp")
    save(str(tmp_path / "a.ckpt"), 6)
    handler = type("Handler", (Files,), {"folder": tmp_path, "ranges": ranges})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.ckpt"
        assert holds(url, 6)
        file = next((tmp_path / "a.ckpt").glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        with pytest.raises(CorruptCheckpointError, match=f"{url}/{file.name}: expected xxh3_128"):
            read(url)
        server.shutdown()
