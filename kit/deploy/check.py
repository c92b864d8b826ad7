"""kit deploy check: what of a bundle is proven on this machine, and what only a Docker daemon or a GPU can tell."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from kit.catalog.paths import DATA, load_yaml
from kit.deploy.queries import expressions, unknown_names
from kit.deploy.stage import edge_files, listens, nginx
from kit.errors import UserError

PASSED, FAILED, OPEN = "passed", "failed", "not provable here"
FACTS = load_yaml(DATA / "deploy_check.yaml")
RESOURCES = load_yaml(DATA / "custom_resources.yaml")["kinds"]
TOOLS = DATA.parent / ".deploy"  # NAME/bin: environments of make deploy-tools
DSTACK = """import sys, yaml, dstack._internal.core.models.configurations as models
models.parse_apply_configuration(yaml.safe_load(open(sys.argv[1])))"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One check of a bundle: passed, failed or not provable here, and why."""

    check: str
    status: str
    reason: str


def check(folder: Path, parts: Collection[str] = ()) -> list[Finding]:
    """Every finding about the bundle in a folder, or those of some `parts` (keys of CHECKS)."""
    try:
        bundle = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder}: no bundle there (no readable bundle.json); kit deploy --out writes one") from None
    found = [one for name in CHECKS if name in (parts or CHECKS) for one in CHECKS[name](folder, bundle)]
    return found + [Finding(name, OPEN, why) for name, why in FACTS["not_provable"][bundle["target"]].items()]


def _judged(name: str, good: str, faults: list[str]) -> Iterator[Finding]:
    yield Finding(name, FAILED if faults else PASSED, "; ".join(faults) if faults else good)


def _tool(program: str) -> str | None:
    beside = (Path(sys.executable).parent / program, TOOLS / "tools" / "bin" / program, TOOLS / program)
    return shutil.which(program) or next((str(path) for path in beside if path.exists()), None)


def _ran(name: str, program: str, *arguments: str | Path, cwd: Path | None = None) -> Iterator[Finding]:
    """What a program says: passed where it ends with 0, else the line that tells why not."""
    if (path := _tool(program)) is None:
        yield Finding(name, OPEN, f"{program} is not installed: {FACTS['tools'][program]}")
        return
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    first = next((at for at, line in enumerate(lines) if _FAULT.search(line)), len(lines) - 1)
    said = " ".join(lines[max(0, first) : first + 2]) or "no message"
    if done.returncode or "find schema" in said:  # kubernetes-validate ends with 0 where it knows no schema
        yield Finding(name, FAILED if done.returncode else OPEN, said)
    else:
        yield Finding(name, PASSED, f"{program} accepts it")


def _ran_on(document: dict[str, Any], name: str, program: str, *arguments: str) -> Iterator[Finding]:
    """What a program says to a document, as YAML in a file of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(document, file)
        file.flush()
        yield from _ran(name, program, *arguments, file.name)


def _files(folder: Path, bundle: dict[str, Any]) -> Iterator[Finding]:
    lost = [f"{name} is missing" for name in bundle["files"] if not (folder / name).is_file()]
    yield from _judged("files", f"all {len(bundle['files'])} files of bundle.json are there", lost)


def _edge(folder: Path, _: dict[str, Any]) -> Iterator[Finding]:
    """nginx and gixy read the edge's configuration as its start script would lay it out."""
    if not (folder / "edge" / "nginx.conf").exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch)
        text = "".join(path.read_text(encoding="utf-8") for path in sorted((folder / "edge").glob("*.conf")))
        peers = {f"{host}:{port}": f"127.0.0.1:{port}" for host, port in re.findall(r"server ([\w.-]+):(\d+)", text)}
        edge_files(folder, run, peers, {port: int(port) for port in listens(folder)})
        (run / "keys.map").write_text('"Bearer 0" "check";\n')
        (run / "tmp").mkdir()
        if "tls.crt" in text:
            what = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=check", "-days", "1"]
            subprocess.run(["openssl", *what, "-keyout", "tls.key", "-out", "tls.crt"], cwd=run, capture_output=True)
        yield from _ran("edge: nginx -t", *nginx(run), "-t")
        yield from _ran("edge: gixy", "gixy", "--skips", FACTS["gixy_skips"], run / "nginx.conf")
    for path in sorted(folder.rglob("*.sh")):
        yield from _ran(f"shell syntax: {path.name}", "sh", "-n", path)


def _monitoring(folder: Path, _: dict[str, Any]) -> Iterator[Finding]:
    """promtool and amtool read the monitoring; the dashboards' queries as if they were rules."""
    if (config := folder / "monitoring" / "prometheus.yml").exists():
        yield from _ran("Prometheus and its rules", "promtool", "check", "config", config)
    if (config := folder / "monitoring" / "alertmanager.yml").exists():
        yield from _ran("Alertmanager", "amtool", "check-config", config)
    found = enumerate(expressions(folder))
    rules = [{"record": f"panel:{number}", "expr": query} for number, (path, query) in found if path.suffix == ".json"]
    if rules:
        panels = {"groups": [{"name": "panels", "rules": rules}]}
        yield from _ran_on(panels, f"dashboards: {len(rules)} queries", "promtool", "check", "rules")


def _metrics(folder: Path, bundle: dict[str, Any]) -> Iterator[Finding]:
    if not (found := expressions(folder)):
        return
    engines = sorted({(pool["engine"], str(pool["engine_version"])) for pool in bundle["values"]["pools"].values()})
    faults, sources = unknown_names(folder, found, engines)
    told = f"{len(found)} queries name only what {', '.join(sources)} and this bundle's own rules print"
    yield from _judged("metric names and labels", told, faults)


def _documents(folder: Path) -> Iterator[tuple[Path, Any]]:
    for path in sorted(folder.rglob("*.y*ml")):
        if path.name != "values.yaml":
            yield from ((path, one) for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one)


def _images(folder: Path, _: dict[str, Any]) -> Iterator[Finding]:
    texts = {path.name: path.read_text(encoding="utf-8") for path, _ in _documents(folder)}
    texts |= {f"{p.parent.name}/{p.name}": p.read_text(encoding="utf-8") for p in folder.rglob("Dockerfile*")}
    named = [(where, image.strip("\"'")) for where, text in texts.items() for image in _IMAGE.findall(text)]
    loose = [f"{where}: {image}" for where, image in named if not _PINNED.search(image) or image.endswith(":latest")]
    digests = sum("@sha256:" in image for _, image in named)
    yield from _judged("images pinned", f"{len(named)} images have a version, {digests} of them a digest", loose)


POD = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}}
_FAULT = re.compile(r"emerg|Problem:|error|FAILED|invalid|find schema", re.IGNORECASE)
_IMAGE = re.compile(r"^\s*(?:- )?(?:image:|FROM)\s+(\S+)", re.MULTILINE)
_PINNED = re.compile(r":[\w.+-]*\d[\w.+-]*(@sha256:[0-9a-f]{64})?$")
_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|"
    r"(?i:(?:api[_-]?key|password|passwd|token|secret)[\"']?\s*[:=]\s*[\"']?(?![\"']?[/$.{\[])[A-Za-z0-9+/_-]{20,})|"
    r"--(?:api-key|hf-token|password)[= ]+[\w-]{4,}"
)


def _secrets(folder: Path, _: dict[str, Any]) -> Iterator[Finding]:
    own, faults = folder / "secrets", list[str]()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and own not in path.parents):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if _SECRET.search(line):
                faults.append(f"{path.relative_to(folder)}:{number} looks like a secret")
    if own.exists() and own.stat().st_mode & 0o077:
        faults.append(f"secrets/ is open to others ({own.stat().st_mode & 0o777:o}); want 700")
    yield from _judged("secrets", "no key, token or password stands in a file of the bundle", faults)


def _compose(folder: Path, _: dict[str, Any]) -> Iterator[Finding]:
    """Every compose file: accepted by a compose program, and every container locked down."""
    for path in sorted(folder.rglob("compose*.yaml")):
        name, text = path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")
        services = yaml.safe_load(text)["services"]
        faults = [f"{who}: {what}" for who, one in services.items() for what in _open_doors(one)]
        yield from _judged(f"{name}: containers locked down", f"{len(services)} services", faults)
        docker = _tool("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True)
        call = ("docker", "compose") if docker and not docker.returncode else ("docker-compose",)
        yield from _ran(f"{name}: compose config", *call, "-f", path, "config", "-q")


def _open_doors(service: dict[str, Any]) -> Iterator[str]:
    """What a container lacks: data/deploy_check.yaml names each setting."""
    memory = service.get("deploy", {}).get("resources", {}).get("limits", {}).get("memory")
    locked = "no-new-privileges:true" in service.get("security_opt", [])
    given = service | {"memory": memory, "no_new_privileges": locked}
    yield from (f"no {name}" for name in FACTS["hardened"] if not given.get(name))
    if not service.get("user") and service.get("network_mode") != "none":
        yield "runs as its image's user; want user:"
    yield from (f"{name} is set" for name in FACTS["forbidden"] if service.get(name) in (True, "host"))


def _kubernetes(folder: Path, bundle: dict[str, Any]) -> Iterator[Finding]:
    """Kubernetes' own objects and pod templates by its schemas, custom ones by data/custom_resources.yaml."""
    for path, one in _documents(folder) if bundle["target"] == "kubernetes" else ():
        if not isinstance(one, dict) or not {"apiVersion", "kind", "metadata"} <= one.keys():
            continue
        name, read = f"Kubernetes schema: {path.name}: {one['kind']} {one['metadata']['name']}", [one]
        if rule := RESOURCES.get(one["kind"]):
            faults = [f"{at.json_path}: {at.message}" for at in Draft202012Validator(rule).iter_errors(one)]
            yield from _judged(name, "only fields of its definition", faults)
            pods = {} if faults else one["spec"].get("leaderWorkerTemplate", {})
            read = [{**POD, "template": pod} for key, pod in pods.items() if key.endswith("Template")]
        for part in read:
            yield from _ran_on(part, name if part is one else f"{name}: its pods", "kubernetes-validate", "--strict")


def _others(folder: Path, bundle: dict[str, Any]) -> Iterator[Finding]:
    """Dockerfiles and dstack files through the tools that read them."""
    for path in sorted(folder.rglob("Dockerfile*")):
        yield from _ran(f"hadolint {path.parent.name}/{path.name}", "hadolint", path)
    for path in sorted(folder.rglob("*.dstack.yml")):
        yield from _ran(f"dstack parses {path.name}", "dstack/bin/python", "-c", DSTACK, path)


CHECKS: dict[str, Callable[[Path, dict[str, Any]], Iterator[Finding]]] = {
    "files": _files, "secrets": _secrets, "images": _images, "edge": _edge, "compose": _compose,
    "monitoring": _monitoring, "metrics": _metrics, "kubernetes": _kubernetes, "others": _others,
}  # fmt: skip
