"""The command that starts an engine, from the templates and flag names of data/engines."""

import os
import re
import shlex
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kit.catalog.paths import DATA
from kit.engine_config import engine_data
from kit.errors import UserError

ROOT = DATA.parent
ENVIRONMENTS = ROOT / ".engines"
_OPEN_FLAGS, _OPEN_PORT = "--flags-to-come", 65_535  # stand in a command until they are known


@dataclass(frozen=True)
class Launch:
    """What to run and how to tell that it serves."""

    engine: str
    argv: list[str]
    environment: dict[str, str]
    host: str
    port: int
    model_name: str
    health: str
    failure_noise: list[str]
    container: str | None = None  # a docker container's name: it outlives the command that started it
    cpu: bool = False  # what a CPU engine shows is behaviour, never speed

    @property
    def base_url(self) -> str:
        return f"http://{self.host}:{self.port}"


def flag_arguments(engine: str, flags: Mapping[str, object]) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment variables for our flag names, or for the engine's own (--name).

    >>> flag_arguments("sglang", {"max_num_seqs": 64, "enforce_eager": True, "--enable-mixed-chunk": ""})
    (['--max-running-requests', '64', '--disable-cuda-graph', '--enable-mixed-chunk'], {})
    """
    names = engine_data(engine)["flags"]
    arguments: list[str] = []
    variables: dict[str, str] = {}
    for name, value in flags.items():
        if value is None or value is False:
            continue
        spelling = name if name.startswith("-") else names.get(name)
        if spelling is None:
            raise UserError(f"{engine} has no flag for {name}; it has {', '.join(filter(names.get, names))}")
        if not spelling.startswith("-"):
            variables[spelling] = str(value)
        else:
            arguments += [spelling] if value is True or value == "" else [spelling, str(value)]
    return arguments, variables


def _mount(place: str, is_local: bool) -> str:
    """Docker's arguments through which a container gets the model: its folder, or the hub's cache and key."""
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return f"-v {place}:{place}:ro" if is_local else f"-e HF_TOKEN -v {hub}:/root/.cache/huggingface"


def launch(
    engine: str,
    model: str,
    flags: Mapping[str, object] | None = None,
    *,
    port: int,
    host: str = "127.0.0.1",
    served_model_name: str | None = None,
    command: str | None = None,
    docker: bool = False,
    version: str | None = None,
) -> Launch:
    """The start of an engine: from .engines/<engine> (make engine), a docker image, or `command`.

    A `command` of the user's may hold {model}, {host}, {port}, {served_model_name} and {flags};
    flags go to its end where it holds no {flags}.
    """
    data = engine_data(engine)
    rule, folder = data["start"], ENVIRONMENTS / engine
    cpu = command is None and not docker and (folder / "cpu").exists()
    if not command and not docker and not (folder / "bin").is_dir():
        raise UserError(f"{engine} is not installed: make engine ENGINE={engine}, or give its command")
    added, variables = flag_arguments(engine, flags or {})
    is_local = Path(model).is_dir()
    place = str(Path(model).resolve()) if is_local else model
    fields: dict[str, object] = {
        "bin": folder / "bin", "root": ROOT, "model": place, "host": host, "port": port,
        "served_model_name": served_model_name or model, "name": f"kit-{engine}-{port}",
        "image": rule["image"].format(version=version or data["newest"]), "flags": shlex.join(added),
        "mount": _mount(place, is_local),
    }  # fmt: skip
    special = rule.get("cpu", {}) if cpu else {}
    template = command or (rule["docker"] if docker else special.get("command", rule["command"]))
    try:
        argv = shlex.split(template.format_map(fields))
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"engine command {template!r}: {error}; known: {', '.join(fields)}") from None
    argv += shlex.split(special.get("arguments", "")) + ([] if "{flags}" in template else added)
    stated = {name: os.environ.get(name, text) for name, text in rule["environment"].items()}
    stated |= ({"HF_HUB_OFFLINE": "1"} if is_local else {}) | special.get("environment", {})
    environment = {name: text.format_map(fields) for name, text in stated.items()} | variables
    if docker:  # the container sees these only when told
        argv[2:2] = [part for name, value in environment.items() for part in ("-e", f"{name}={value}")]
    return Launch(
        engine, argv, environment, host, port, served_model_name or model, rule["health"], rule["failure_noise"],
        str(fields["name"]) if docker else None, cpu,
    )  # fmt: skip


def template(engine: str, model: str, flags: Mapping[str, object], command: str | None = None) -> str:
    """The start of an engine as one command with {port} and {flags} left open, its environment included."""
    one = launch(engine, model, {**flags, _OPEN_FLAGS: ""}, port=_OPEN_PORT, command=command)
    given = [f"{name}={value}" for name, value in one.environment.items()]
    text = shlex.join(["env", *given, *one.argv]).replace("{", "{{").replace("}", "}}")
    return text.replace(_OPEN_FLAGS, "{flags}").replace(str(_OPEN_PORT), "{port}")


def port_of(engine: str, command: str) -> int:
    """The port that a command names with --port, else the engine's own default.

    >>> port_of("vllm", "vllm serve m --port 9000 {flags}"), port_of("sglang", "serve {flags}")
    (9000, 30000)
    """
    found = re.search(r"--port[= ]+(\d+)", command) or re.search(
        r"{port}:(\d+)", engine_data(engine)["start"]["docker"]
    )
    if not found:
        raise UserError(f"engine command {command!r}: no {{port}} in it")
    return int(found[1])


def free_port(wanted: int = 0) -> int:
    """That TCP port of 127.0.0.1 where it is free, else any that is."""
    try:
        with socket.create_server(("127.0.0.1", wanted)) as probe:
            return int(probe.getsockname()[1])
    except OSError:
        return free_port()
