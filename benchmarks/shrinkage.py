"""Step-time coefficients as a shrunken sum of effects, fitted to logarithms of TTFT and TPOT.

log coefficient = prior + engine + era + architecture + GPU + family, each effect pulled towards 0 by
its own width, so that a GPU or family without data falls back to the mean of the rest. Gauss-Newton
with exact derivatives: each part of a step is its derivative by the logarithm of its coefficient.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import scipy.sparse as sp

from kit.steptime.model import request_parts, step_parts
from kit.steptime.work import Work

SCALE = 0.1  # residuals beyond this in log space count less than squared
STRENGTH = 20.0  # of the priors against the rows: errors within a group of rows are not independent
ROWS_PER_GROUP = 20  # larger groups of rows are weighted down to this
GROUPS = {
    "mem": ("read", "read_e", "kv", "kv8"),
    "cmp": ("gemm_bf16", "gemm_fp8", "gemm_fp4", "gemm_e", "attn"),
    "link": ("reduce", "reduce_hop", "link"),
    "host": ("fixed", "layer", "moe_layer", "index_layer", "state_layer", "row", "prefill", "prefill_layer"),
    "step": ("fixed", "layer", "moe_layer", "index_layer", "state_layer", "prefill", "prefill_layer"),
    "moe": ("read_e", "gemm_e", "moe_layer"),
    "request": ("api", "token", "stream"),
}
FIELDS = [field.name for field in fields(Work)]


@dataclass
class Effect:
    """A table of factors: which level a row has (None: no factor), on which coefficients, how wide."""

    name: str
    level: Callable[[object], object]
    group: str  # a key of GROUPS, or one coefficient
    width: float

    @property
    def coefficients(self) -> tuple[str, ...]:
        """The coefficients that one factor of this effect multiplies."""
        return GROUPS.get(self.group, (self.group,))


class Design:
    """Rows with their steps, and how effects make their coefficients."""

    def __init__(self, rows: Sequence, work: Sequence[Work], bins: Sequence, prior: dict[str, tuple[float, float]],
                 effects: Sequence[Effect]) -> None:  # fmt: skip
        self.rows, self.prior, self.effects = rows, prior, effects
        self.names, n = list(prior), len(rows)
        self.labels: list[tuple] = []
        self.width: list[float] = []
        entries: dict[str, list[tuple[np.ndarray, int]]] = {name: [] for name in self.names}
        for name in self.names:
            self._add((None, None, name), prior[name][1], np.arange(n), (name,), entries)
        for effect in effects:
            levels = [effect.level(row) for row in rows]
            for level in sorted({one for one in levels if one is not None}, key=str):
                mine = np.array([i for i, one in enumerate(levels) if one == level])
                self._add((effect.name, level, effect.group), effect.width, mine, effect.coefficients, entries)
        self.z = {name: self._matrix(entries[name], n) for name in self.names}
        self.penalty = STRENGTH / np.array(self.width) ** 2
        size = Counter(row.group for row in rows)
        self.weight = np.array([min(1.0, ROWS_PER_GROUP / size[row.group]) ** 0.5 for row in rows])
        self.work = {name: np.array([getattr(one, name) for one in work], float) for name in FIELDS}
        self.isl = np.array([row.isl for row in rows], float)
        self.streams = np.array([row.concurrency or 1 for row in rows], float)
        self.kinds = [self._kind([pair[which] for pair in bins]) for which in (1, 0)]  # TPOT, then TTFT
        self.seen = [np.array([getattr(row, f) or np.nan for row in rows], float) for f in ("tpot_s", "ttft_s")]

    def _add(self, label: tuple, width: float, mine: np.ndarray, names: Sequence[str], entries: dict) -> None:
        for name in names:
            entries[name].append((mine, len(self.labels)))
        self.labels.append(label)
        self.width.append(width)

    def _matrix(self, entries: list[tuple[np.ndarray, int]], n: int) -> sp.csr_matrix:
        row = np.concatenate([mine for mine, _ in entries])
        column = np.concatenate([np.full(len(mine), one) for mine, one in entries])
        return sp.csr_matrix((np.ones(len(row)), (row, column)), shape=(n, len(self.labels)))

    @staticmethod
    def _kind(bins: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(bins), np.repeat(np.arange(len(bins)), [len(one) for one in bins])

    def coefficients(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Each coefficient of each row."""
        return {name: self.prior[name][0] * np.exp(np.clip(self.z[name] @ x, -6, 6)) for name in self.names}

    def predict(self, x: np.ndarray, jacobian: bool = False) -> list[tuple[np.ndarray, sp.csr_matrix | None]]:
        """Mean TPOT and mean TTFT of all rows, with derivatives of their logarithms on request."""
        c, n, out = self.coefficients(x), len(self.rows), []
        for kind, (bins, row) in enumerate(self.kinds):
            work = Work(**{name: one[row] for name, one in self.work.items()})
            parts = step_parts(work, {name: one[row] for name, one in c.items()}, *bins[:, :5].T)
            total = {name: np.bincount(row, part * bins[:, 5], minlength=n) for name, part in parts.items()}
            if kind == 1:
                total |= request_parts(c, self.isl, self.streams)
            value, slope = sum(total.values()), None
            if jacobian:
                slope = sp.csr_matrix(sum(self.z[name].multiply((one / value)[:, None]) for name, one in total.items()))
            out.append((value, slope))
        return out

    def solve(self, x: np.ndarray | None = None, used: np.ndarray | None = None, steps: int = 40) -> np.ndarray:
        """Effects that fit the rows used (all by default), by damped Gauss-Newton on a robust loss."""
        x = np.zeros(len(self.labels)) if x is None else x.copy()
        used = np.ones(len(self.rows), bool) if used is None else used
        rows = [used & np.isfinite(seen) for seen in self.seen]
        loss, gradient, curvature = self._loss(x, rows, True)
        damping = 1e-3
        for _ in range(steps):
            for _ in range(8):
                move = -np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), gradient)
                tried = x + np.clip(move, -1, 1)
                new_loss = self._loss(tried, rows, False)[0]
                if new_loss < loss:
                    break
                damping *= 5
            else:
                return x
            settled, damping = loss - new_loss < 1e-4 * loss, max(damping / 5, 1e-6)
            x = tried
            loss, gradient, curvature = self._loss(x, rows, True)
            if settled:
                return x
        return x

    def _loss(self, x: np.ndarray, rows: list[np.ndarray], slopes: bool) -> tuple:
        loss, gradient, curvature = float(self.penalty @ x**2), self.penalty * x, np.diag(self.penalty)
        for (value, slope), seen, mine in zip(self.predict(x, slopes), self.seen, rows, strict=True):
            error, weight = np.log(value[mine] / seen[mine]), self.weight[mine]
            bend = np.sqrt(1 + (error / SCALE) ** 2)
            loss += float(np.sum(2 * weight * (bend - 1)))
            if slopes:
                j, w = slope[mine], weight / bend / SCALE**2
                gradient = gradient + j.T @ (w * error)
                curvature = curvature + (j.T @ j.multiply(w[:, None])).toarray()
        return loss, gradient, curvature

    def factors(self, x: np.ndarray, name: str | None) -> dict[object, dict[str, float]]:
        """Factors of one effect by level and coefficient."""
        table: dict[object, dict[str, float]] = {}
        group_of = {effect.group: effect.coefficients for effect in self.effects}
        for (effect, level, group), value in zip(self.labels, x, strict=True):
            if effect == name:
                row = table.setdefault(level, {})
                for one in group_of.get(group, (group,)) if name else (group,):
                    row[one] = row.get(one, 1.0) * float(np.exp(value))
        return table
