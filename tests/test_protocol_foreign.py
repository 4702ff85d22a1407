"""Three clients that others wrote talk to the server: pynvim, the npm package neovim, and Neovim itself.

They send and read what they like to; what they make of the answers is compared here.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from foreign_clients import neovim, npm_modules
from rpc_serving import METHODS, RpcServing

from backend.vm.errors import CannotRun

ECHOED: dict[str, Any] = {
    "text": "grüße, 世界",
    "empty": "",
    "long": "x" * 100_000,
    "numbers": [0, -1, 127, 128, 65536, -(1 << 31), (1 << 31), 1 << 40],
    "half": 0.5,
    "yes": True,
    "within": {"a": [{"b": [1, 2]}]},
}
SENTENCE = "no IOASID 7 in this context: ALLOC one («µ»)"


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[RpcServing]:
    with RpcServing(tmp_path / "rpc.sock") as made:
        yield made


def run(argv: list[str], tmp_path: Path, **environment: str) -> dict[str, Any]:
    """Run a client's script, at home in an empty folder, and read the JSON that it prints."""
    home = {
        name: str(tmp_path) for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME")
    }
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={
            "PATH": os.environ.get("PATH", ""),
            "ECHOED": json.dumps(ECHOED),
            "SENTENCE": SENTENCE,
            **home,
            **environment,
        },
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


# -- pynvim ------------------------------------------------------------------------------------------------------------


def test_pynvim(serving: RpcServing) -> None:
    msgpack_rpc = pytest.importorskip("pynvim.msgpack_rpc", reason="pynvim is missing. Run: pip install pynvim")
    session = msgpack_rpc.socket_session(str(serving.path))  # says at once who it is, by a notification
    try:
        assert session.request("hello")["methods"] == sorted(["hello", *METHODS])
        assert session.request("hello", {})["version"] == 1
        assert session.request(b"add", {"a": 1, "b": 2}) == 3
        assert session.request("echo", {**ECHOED, "none": None, "data": b"\x00\xff"}) == {
            **ECHOED, "none": None, "data": b"\x00\xff"
        }  # fmt: skip
        with pytest.raises(Exception, match="no IOASID 7") as caught:
            session.request("refuse", {"errno": 2, "sentence": SENTENCE})
        assert caught.value.args == (SENTENCE,)
        with pytest.raises(Exception, match="there is no method 'nothing'"):
            session.request("nothing", {})
        session.request("nothing", {}, async_=True)  # a notification
        session.request("notify", {"count": 2})
        for number in range(2):
            message = session.next_message()
            assert (message.type, message.name, message.args) == (
                "notification",
                "tick",
                [{"number": number, "data": b""}],
            )
        assert [session.request("add", {"a": n, "b": 0}) for n in range(300)] == list(range(300))
    finally:
        session.close()


# -- The npm package neovim --------------------------------------------------------------------------------------------

NODE = """
const { attach } = require('neovim');
const say = text => process.stdout.write(text); // console belongs to the package
(async () => {
  const nvim = attach({ socket: process.env.RPC_SOCKET }); // asks for nvim_get_api_info, which is refused
  const told = [];
  nvim.transport.on('notification', (method, args) => told.push([method, args[0].number]));
  const ask = (method, ...args) => new Promise(done =>
    nvim.transport.request(method, args, (error, result) => done(error === null ? result : { error })));
  const answers = {
    hello: await ask('hello'),
    add: await nvim.request('add', [{ a: 1, b: 2 }]),
    echo: await ask('echo', JSON.parse(process.env.ECHOED)),
    refused: await ask('refuse', { errno: 2, sentence: process.env.SENTENCE }),
    thrown: await nvim.request('refuse', [{ errno: 2, sentence: process.env.SENTENCE }]).catch(error => error.message),
    unknown: await ask('nothing', {}),
    told,
  };
  nvim.transport.notify('nothing', [{}]);
  await ask('notify', { count: 2 });
  answers.many = await Promise.all(Array.from({ length: 300 }, (_, n) => ask('add', { a: n, b: 0 })));
  await ask('later', { seconds: 0.01 });
  say(JSON.stringify(answers));
  await nvim.transport.close();
})().catch(error => { say(JSON.stringify({ failed: String(error) })); process.exitCode = 1; });
"""


def test_the_npm_client(serving: RpcServing, tmp_path: Path) -> None:
    modules = npm_modules()
    if isinstance(modules, CannotRun):
        pytest.skip(str(modules))
    script = tmp_path / "client.js"
    script.write_text(NODE)
    answers = run(["node", str(script)], tmp_path, NODE_PATH=str(modules), RPC_SOCKET=str(serving.path))
    assert answers["hello"]["version"] == 1
    assert answers["add"] == 3
    assert answers["echo"] == ECHOED
    assert answers["refused"] == {"error": [2, SENTENCE]}
    assert SENTENCE in answers["thrown"]
    assert answers["unknown"]["error"][0] == 25
    assert answers["told"] == [["tick", 0], ["tick", 1]]
    assert answers["many"] == list(range(300))
    serving.wait_until_alone()


# -- Neovim ------------------------------------------------------------------------------------------------------------

LUA = """
local channel = vim.fn.sockconnect('pipe', vim.env.RPC_SOCKET, { rpc = true })
local function ask(...)
  local well, answer = pcall(vim.rpcrequest, channel, ...)
  return well and answer or { refused = answer }
end
local answers = {
  hello = ask('hello'),
  hello_with_empty_table = ask('hello', {}),
  add = ask('add', { a = 1, b = 2 }),
  echo = ask('echo', vim.fn.json_decode(vim.env.ECHOED)),
  refused = ask('refuse', { errno = 2, sentence = vim.env.SENTENCE }),
  refused_with_1 = ask('refuse', { errno = 1, sentence = vim.env.SENTENCE }),
  unknown = ask('nothing'),
  many = {},
}
vim.rpcnotify(channel, 'nothing', {})
ask('notify', { count = 2 }) -- Neovim looks for a function of this name, and says by a notification that it has none
ask('tell', { method = 'nvim_set_var', params = { 'told', 42 } })
for n = 1, 300 do answers.many[n] = ask('add', { a = n, b = 0 }) end
vim.wait(5000, function() return vim.g.told ~= nil end)
answers.told = vim.g.told
vim.fn.chanclose(channel)
io.stdout:write(vim.fn.json_encode(answers))
"""


def test_neovim(serving: RpcServing, tmp_path: Path) -> None:
    found = neovim()
    if isinstance(found, CannotRun):
        pytest.skip(str(found))
    script = tmp_path / "client.lua"
    script.write_text(LUA)
    argv = [*found.argv, "--headless", "-u", "NONE", "-i", "NONE", "-n", "-c", f"luafile {script}", "-c", "qa!"]
    answers = run(argv, tmp_path, RPC_SOCKET=str(serving.path), **found.environment)
    assert answers["hello"]["version"] == 1
    assert answers["hello_with_empty_table"] == answers["hello"]
    assert answers["add"] == 3
    assert answers["echo"] == ECHOED
    # it knows errors 0 and 1 alone, and says "unknown error" of others; that one was refused it sees
    assert answers["refused"]["refused"]
    assert SENTENCE in answers["refused_with_1"]["refused"]
    assert answers["unknown"]["refused"]
    assert answers["told"] == 42
    assert answers["many"] == list(range(1, 301))
    serving.wait_until_alone()
