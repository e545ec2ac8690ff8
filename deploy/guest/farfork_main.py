"""A warm main process in Python: imports what a template names, then answers requests in its children.

    python3 /usr/lib/farfork/main.py [MODULE...]        with the agent's socket as standard input

Messages are JSON behind their length (u32, little-endian). docs/guests.md describes them.

Code of a template may register what is to happen in each child before any request:

    import __main__ as farfork
    farfork.on_fork(lambda seed: ...)       # seed: 32 fresh random bytes
"""

import importlib
import io
import json
import os
import signal
import socket
import struct
import sys
import traceback

MESSAGE_MAX = 1 << 20
namespace = {"__name__": "__farfork__", "__builtins__": __builtins__}
_hooks = []


def on_fork(hook):
    """Calls hook(seed) in each child, before its first request. Returns the hook, to be used as a decorator."""
    _hooks.append(hook)
    return hook


@on_fork
def _reseed_random(seed):
    # Only what was imported can have state.
    module = sys.modules.get("random")
    if module is not None:
        module.seed(seed + b"random")


@on_fork
def _reseed_numpy(seed):
    module = sys.modules.get("numpy")
    if module is not None:
        words = struct.unpack("<8I", seed)
        module.random.seed(list(words))


@on_fork
def _reseed_openssl(seed):
    # OpenSSL reseeds itself when it sees another process id, which a child of a machine does not have.
    module = sys.modules.get("ssl") or sys.modules.get("_ssl")
    if module is not None:
        module.RAND_add(seed + b"openssl", float(len(seed)))


def _forked(request):
    seed = bytes.fromhex(request["seed"])
    failed = []
    for hook in _hooks:
        try:
            hook(seed)
        except Exception as error:  # A hook that fails is reported, and the others run.
            failed.append(f"{getattr(hook, '__name__', 'a hook')}: {error!r}")
    if failed:
        return {"ok": False, "error": "; ".join(failed)}
    return {"ok": True}


def _eval(request):
    code = request["code"]
    out = io.StringIO()
    stdout, sys.stdout = sys.stdout, out
    try:
        try:
            compiled = compile(code, "<eval>", "eval")
        except SyntaxError:
            exec(compile(code, "<eval>", "exec"), namespace)
            value = None
        else:
            value = eval(compiled, namespace)
        answer = {"ok": True, "value": None if value is None else repr(value)}
    except BaseException as error:
        # SystemExit and KeyboardInterrupt too: the process is wanted for the next request.
        answer = {"ok": False, "error": "".join(traceback.format_exception_only(type(error), error)).strip(),
                  "traceback": traceback.format_exc(limit=-16)}
    finally:
        sys.stdout = stdout
    answer["stdout"] = out.getvalue()
    return answer


def _receive(channel, count):
    parts = []
    while count:
        part = channel.recv(min(count, 1 << 16))
        if not part:
            sys.exit(0)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _send(channel, message):
    body = json.dumps(message).encode()
    if len(body) > MESSAGE_MAX:
        body = json.dumps({"ok": False, "error": f"the answer has {len(body)} bytes; at most {MESSAGE_MAX} are allowed"}).encode()
    channel.sendall(struct.pack("<I", len(body)) + body)


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    channel = socket.socket(fileno=os.dup(0))
    # Code of users must not read from the agent's socket.
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for name in sys.argv[1:]:
        namespace[name.partition(".")[0]] = importlib.import_module(name.partition(".")[0])
        importlib.import_module(name)
    _send(channel, {"op": "ready"})
    operations = {"eval": _eval, "forked": _forked}
    while True:
        (length,) = struct.unpack("<I", _receive(channel, 4))
        request = json.loads(_receive(channel, length))
        operation = operations.get(request.get("op"))
        if operation is None:
            _send(channel, {"ok": False, "error": f"no operation {request.get('op')!r}"})
        else:
            _send(channel, operation(request))


if __name__ == "__main__":
    main()
