"""A live run: this host's engine behind the notebooks that measure; what an interrupted one had done is kept."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kit import catalog, run, scenario
from kit.catalog.paths import write_json
from kit.decision import decide
from kit.engine_config import engine_data
from kit.engines import Engine, launch, start
from kit.engines.launch import ENVIRONMENTS, ROOT, free_port, template
from kit.errors import UserError, unknown

# Each with the flag that makes it say in `usage` what of a prompt it found cached.
ENGINES = {"vllm": "--enable-prompt-tokens-details", "sglang": "--enable-cache-report"}
CPU_LIMITS = {"max_num_seqs": 16, "enforce_eager": True}


class Live:
    """One live run of an engine; live.json in its folder says what it has done."""

    def __init__(self, engine: str, command: str | None, on_gpu: bool) -> None:
        if engine not in ENGINES:
            raise unknown("--engine", engine, list(ENGINES))
        folder = ENVIRONMENTS / engine
        if command is None and not ((folder / "bin").is_dir() and (folder / "cpu").exists() != on_gpu):
            raise UserError(f"--live: no {engine} ({'GPU' if on_gpu else 'CPU'}) here: make engine ENGINE={engine}")
        self.engine, self.command, self.on_gpu = engine, command, on_gpu
        self.note = None if on_gpu else f"{engine} ran without a GPU: this shows its behaviour, never a speed"
        self.running: Engine | None = None
        self.tuned = {"max_num_seqs", engine_data(engine)["flags"]["max_num_seqs"]}

    def walkthrough(self, notebooks: Sequence[Path], root: Path, *values: Any) -> run.Walk:
        """Like run.walkthrough; the engine starts with the first notebook that measures and is stopped at the end."""
        self.root, asked = root.resolve(), [self.engine, self.command, self.on_gpu]
        self.state = _read(self.root / "live.json")
        if self.state.get("over", True) or self.state["asked"] != asked:
            self.state = {"asked": asked, "port": 0, "over": False}
        with ExitStack() as self.stack:
            rows, index = run.walkthrough(notebooks, self.root, *values, one=self._execute)
        self._save(over=not any(row["error"] for row in rows))
        return rows, index

    def _execute(self, notebook: Path, folder: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The row of a notebook: run now, or finished with these parameters before an interruption."""
        held = self.state.get(f"done {notebook.stem}", {"asked": None})
        if held["asked"] == parameters and (folder / "results.json").exists():
            return dict(held["row"])
        served = self._serve(notebook, folder / "load", {**run.parameters_of(notebook), **parameters})
        row = run.execute(notebook, folder, {**parameters, **served}, self.note if served else None)
        if not row["error"]:
            self._save(**{f"done {notebook.stem}": {"asked": parameters, "row": row}})
        return row

    def _serve(self, notebook: Path, load: Path, settings: dict[str, Any]) -> dict[str, str]:
        """source and base_url for a notebook that measures, with the engine up; nothing for others.

        One that starts the engine itself, with other flags each time, gets the command for it instead.
        Levels that another server or other parameters gave are put aside, not taken for this run's.
        """
        text, up = notebook.read_text(encoding="utf-8"), self.running and self.running.process.poll() is None
        if "engine_command=engine_command" in text:
            if up and self.running:
                self.running.stop()
            served = {"source": "live", "engine_command": self._command(settings)}
        elif "base_url=base_url" in text:
            if not up or self.running is None:
                self.running = self.stack.enter_context(self._start(settings))
            served = {"source": "live", "base_url": self.running.launch.base_url}
        else:
            return {}
        if load.exists() and self.state.get(f"measured {notebook.stem}") != settings | served:
            load.rename(load.with_name(f"load.until-{time.time_ns()}"))
        self._save(**{f"measured {notebook.stem}": settings | served})
        return served

    def _start(self, settings: Mapping[str, Any]) -> Engine:
        model, flags = self._flags(settings)
        port = self.state["port"] = free_port(self.state["port"])  # the same one: measured levels name it
        wanted, log = launch(self.engine, model, flags, port=port, command=self.command), self.root / "engine.log"
        if log.exists():
            log.replace(log.with_name(f"engine.until-{time.time_ns()}.log"))
        sys.stderr.write(f"\n{self.note or 'On this GPU'}\n{self.engine} starts, log in {log} ")
        engine = start(wanted, log, tell=lambda line: sys.stderr.write("."))
        sys.stderr.write(f" healthy after {engine.started_s:.0f} s\n")
        return engine

    def _command(self, settings: Mapping[str, Any]) -> str:
        """The engine's command with {port} and {flags} left open, its environment included."""
        model, flags = self._flags(settings)
        fixed = {name: value for name, value in flags.items() if name not in self.tuned}
        return template(self.engine, model, fixed, self.command)

    def _flags(self, settings: Mapping[str, Any]) -> tuple[str, dict[str, object]]:
        """The model to serve and its flags: notebook 02's, or its arithmetic; without a GPU small limits."""
        case, told = scenario.load(settings["scenario"]), {ENGINES[self.engine]: ""}
        asked = settings["model"] or case.model
        spec, gpu = catalog.model(asked), catalog.gpu(settings["gpu"])
        given = {name: settings.get(name) for name in ("quantization", "kv_cache_dtype", "max_num_seqs")}
        config = case.config(spec, engine=self.engine, gpu_count=case.gpu_count, **given)
        if not self.on_gpu:
            limits = {name: getattr(config, name) or value for name, value in CPU_LIMITS.items()}
            model = asked if self.command else str(ENVIRONMENTS / "tiny-model")
            return model, {**told, **limits, "max_model_len": config.max_model_len}
        held = _read(self.root / "02_size_vram" / "results.json")
        same = (held.get("model"), held.get("scenario")) == (spec.key, settings["scenario"])
        sized = held["results"] if same else decide(case, spec, gpu, config, case.demand())
        hub = asked if "/" in asked else _read(ROOT / "data" / "models" / f"{spec.key}.json").get("id", asked)
        return hub, {**told, **(sized["recommended"] or sized["asked"])["engine_args"]}

    def _save(self, **news: Any) -> None:
        self.state |= news
        write_json(self.root / "live.json", self.state)


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
