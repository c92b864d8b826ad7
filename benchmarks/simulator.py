"""Cost of the simulator by size: seconds of one core and peak memory, each size in a process of its own.

python benchmarks/simulator.py [--trace FILE of Mooncake's conversation trace]
"""

import argparse
import resource
import subprocess
import sys
from time import process_time

SIZES = (2_000, 20_000, 200_000)  # five-turn conversations
PER_DAY = 10_000


def measure(sessions: int, burst: int | None, trace: str | None) -> str:
    """One line: turns, events, CPU seconds, microseconds per event, MiB."""
    from kit import catalog, simulator, workload
    from kit.engine_config import EngineConfig
    from kit.traces import read

    model, gpu = catalog.model("llama-3.1-8b"), catalog.gpu("h100-sxm-80gb")
    limits, step_time, _ = simulator.replica(model, gpu, EngineConfig())
    begun = process_time()
    if trace:
        load, replicas = simulator.Load(read(trace, "mooncake")), 8
    else:
        days = max(1.0, sessions / PER_DAY)
        source = workload.load("customer-service")
        load, replicas = simulator.Load(source, sessions, days * 86_400, burst), 1
    read_s = process_time() - begun
    begun = process_time()
    sim = simulator.Simulation(simulator.SimulationConfig(limits, replicas), step_time)
    sim.run(load.stream()[0])
    spent = process_time() - begun
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"| {sim.planned:,} | {sim.events:,} | {read_s:.2f} | {spent:.2f} "
        f"| {spent / sim.events * 1e6:.1f} | {peak_mib:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trace")
    parser.add_argument("--one", type=int)
    parser.add_argument("--burst", type=int)
    given = parser.parse_args()
    if given.one is not None:
        print(measure(given.one, given.burst, given.trace), flush=True)
        return
    print(
        "| turns | events | reading s | simulation s | us per event | peak MiB |\n|---|---|---|---|---|---|", flush=True
    )
    runs = [["--one", str(size)] for size in SIZES] + [["--one", str(PER_DAY), "--burst", "1000"]]
    if given.trace:
        runs.append(["--one", "0", "--trace", given.trace])
    for run in runs:
        subprocess.run([sys.executable, __file__, *run], check=True)


if __name__ == "__main__":
    main()
