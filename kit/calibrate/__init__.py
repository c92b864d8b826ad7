"""Calibration: ten minutes of probes of a server, and the few coefficients in which it differs from the model.

    server = LiveServer(target, spec)                    # or VirtualServer(limits, step_time): the same in no time
    calibration = calibrate(spec, gpu, config, server, out=Path("h100.json"), budget_s=600)
    config, basis = load(Path("h100.json")).apply(spec, gpu, config)     # refuses another model, GPU or engine
    answer = predict(spec, gpu, config, ask, basis)                      # its intervals are the calibration's
    limits, step_time, warnings = simulator.replica(spec, gpu, config, basis)

probes (what is sent) -> server (what it did) -> fit (coefficients with which the simulator does the same) -> file.
`calibration.probes` has one row per probe, kind of request and quantity: measured, before and after, in s.
"""

from kit.calibrate.file import Calibration, load
from kit.calibrate.run import calibrate, check_out
from kit.calibrate.server import LiveServer, VirtualServer

__all__ = ["Calibration", "LiveServer", "VirtualServer", "calibrate", "check_out", "load"]
