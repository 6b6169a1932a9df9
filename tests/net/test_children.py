"""Processes with an author's code: whatever they do, their parent goes on."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from atoll.net import children
from atoll.net.children import Begin, Broken, Child, ChildDied, Ready, Survey, worker_replies

CHILD = """
import os, sys, time
from atoll.net.children import Channel, Ready, limit
channel = Channel(int(sys.argv[1]))
said = channel.receive()
what = bytes(said[1]).decode()
if what == "die": os.kill(os.getpid(), 9)
if what == "exit": sys.exit(3)
if what == "hang": time.sleep(100)
if what == "fork":
    if os.fork() == 0:
        open(sys.argv[0] + ".forked", "w").write(str(os.getpid())); time.sleep(100)
    time.sleep(100)
def raw(first, second, content):
    channel._line.sendall(first.to_bytes(8, "little") + second.to_bytes(8, "little") + content)
if what == "long": raw(2**62, 2**62, b""); time.sleep(100)
if what == "blob": channel.reply(Ready("", False, None), b"x" * 1000)
if what == "short": raw(5, 0, b"{}"); sys.exit(0)
if what == "noise": raw(4, 0, b"\\x80\\x04.."); time.sleep(100)
if what == "other": raw(17, 0, b'{"type":"Survey"}')
if what == "write":
    limit(0, 1000)
    try: open(sys.argv[0] + ".big", "wb").write(b"x" * 10**6)
    except OSError as error: channel.reply(Ready("refused", False, None))
if what == "memory":
    limit(2**29, 1000)
    try: x = bytearray(2**30)
    except MemoryError: channel.reply(Ready("refused", False, None))
if what == "fine": channel.reply(Ready(",".join(sorted(os.environ)), False, None), b"answer")
while channel.receive() is not None: pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "childish.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "x")
    return tmp_path


def told(folder: Path, what: str, *, seconds: float = 60.0, largest: int = 100) -> tuple[Any, bytes, Child]:
    async def once() -> tuple[Any, bytes, Child]:
        child = await Child.start("childish", log=folder / "log", cwd=folder)
        try:
            reply, blob = await child.call(Survey(), worker_replies, (what.encode(),), seconds=seconds, largest=largest)
            return reply, blob, child
        finally:
            await child.end()

    return asyncio.run(once())


def test_a_child_is_given_listed_variables_and_answers(module: Path) -> None:
    reply, blob, child = told(module, "fine")
    assert blob == b"answer" and not child.alive
    assert "PATH" in reply.identity and "SECRET" not in reply.identity


@pytest.mark.parametrize(
    ("what", "match"),
    [("die", "signal 9"), ("exit", "exit code 3"), ("long", "could not be read"), ("short", "died"),
     ("noise", "could not be read"), ("other", "could not be read"), ("blob", "could not be read")],
)  # fmt: skip
def test_a_child_that_dies_or_talks_nonsense_is_over(module: Path, what: str, match: str) -> None:
    with pytest.raises(ChildDied, match=match):
        told(module, what)


def test_a_child_that_hangs_is_ended_with_what_it_started(module: Path) -> None:
    with pytest.raises(ChildDied, match="not answered after"):
        told(module, "fork", seconds=15.0)
    forked = int((module / "childish.py.forked").read_text())
    for _ in range(100):
        try:
            os.kill(forked, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{forked}/stat").exists() and ") Z " in Path(f"/proc/{forked}/stat").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("what it started lives on")


FIRST = """
import asyncio, os, sys
from pathlib import Path
from atoll.net.children import Child, Survey, worker_replies
async def once():
    child = await Child.start("childish", log=Path("log"), cwd=Path("."))
    reply, blob = await child.call(Survey(), worker_replies, (b"fine",), seconds=60.0, largest=100)
    print(os.getpid(), bytes(blob))
asyncio.run(once())
"""


def test_a_parent_may_be_the_first_process_as_in_a_container(module: Path) -> None:
    made = subprocess.run(["unshare", "-rpf", "true"], capture_output=True)
    if made.returncode:
        pytest.skip("this machine gives no process a namespace of its own")
    done = subprocess.run(
        ["unshare", "-rpf", sys.executable, "-c", FIRST], cwd=module, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "1 b'answer'\n", done.stderr


@pytest.mark.parametrize("what", ["write", "memory"])
def test_a_child_keeps_within_its_bounds(module: Path, what: str) -> None:
    assert told(module, what)[0] == Ready("refused", False, None)


def test_a_caller_that_goes_away_ends_the_child(module: Path) -> None:
    async def leave() -> Child:
        child = await Child.start("childish", log=module / "log", cwd=module)
        call = asyncio.ensure_future(child.call(Survey(), worker_replies, (b"hang",), seconds=None))
        await asyncio.sleep(0.1)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        return child

    assert not asyncio.run(leave()).alive


def test_a_call_to_a_child_that_somebody_ends_is_over_at_once(module: Path) -> None:
    async def end() -> None:
        child = await Child.start("childish", log=module / "log", cwd=module)
        call = asyncio.ensure_future(child.call(Survey(), worker_replies, (b"hang",), seconds=None))
        await asyncio.sleep(0.1)
        await child.end()
        assert not child.alive
        with pytest.raises(ChildDied, match="signal 9"):
            await asyncio.wait_for(call, 10.0)

    asyncio.run(end())


def test_what_is_said_has_one_form() -> None:
    begin = Begin("/app.py", children.Charter("r", "0" * 64, {}), "s", "", 0, 0)
    encoded = children.msgspec.json.encode(begin)
    assert children.worker_calls.decode(encoded) == begin
    for wrong in (
        encoded.replace(b'"s"', b'"../s"'),
        encoded[:-1] + b',"x":1}',
        b"{}",
        encoded.replace(b"Begin", b"Host"),
    ):
        with pytest.raises(children.msgspec.MsgspecError):
            children.worker_calls.decode(wrong)
    assert children.worker_replies.decode(children.msgspec.json.encode(Broken("ValueError", "x"))).kind == "ValueError"
