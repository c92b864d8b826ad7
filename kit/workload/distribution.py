"""Non-negative random quantities: constant, exponential, log-normal, with a Pareto tail."""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator


class Model(BaseModel):
    """Base of everything read from a workload file: immutable, and no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Distribution(Model):
    """One of `constant`, `mean` (exponential), `median` and `sigma` (log-normal); or a bare number.

    With probability `tail_fraction` the value comes from a Pareto tail that starts at `tail_from`.

    >>> Distribution.model_validate(3).sample(np.random.default_rng(0), 2)
    array([3., 3.])
    """

    constant: float | None = Field(None, ge=0)
    mean: float | None = Field(None, gt=0)
    median: float | None = Field(None, gt=0)
    sigma: float = Field(0.0, ge=0)
    tail_fraction: float = Field(0.0, ge=0, lt=1)
    tail_from: float = Field(0.0, ge=0)
    tail_index: float = Field(1.0, gt=0)
    min: float = Field(0.0, ge=0)
    max: float = Field(float("inf"), gt=0)

    @model_validator(mode="before")
    @classmethod
    def _bare_number(cls, value: Any) -> Any:
        return {"constant": value} if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(value is not None for value in (self.constant, self.mean, self.median)) != 1:
            raise ValueError("give one of constant, mean (exponential) or median (log-normal)")
        if self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self

    def sample(self, rng: np.random.Generator, size: int) -> NDArray[np.float64]:
        """`size` draws."""
        if self.constant is not None:
            values = np.full(size, self.constant)
        elif self.mean is not None:
            values = rng.exponential(self.mean, size)
        else:
            values = (self.median or 0.0) * rng.lognormal(0.0, self.sigma, size)
        if self.tail_fraction:
            tail = self.tail_from * (1 - rng.random(size)) ** (-1 / self.tail_index)
            values = np.where(rng.random(size) < self.tail_fraction, tail, values)
        return np.asarray(np.clip(values, self.min, self.max))

    def tokens(self, rng: np.random.Generator, size: int) -> list[int]:
        """`size` draws rounded to whole tokens, at least one each."""
        return [int(value) for value in np.maximum(1, np.rint(self.sample(rng, size)))]

    def average(self) -> float:
        """Mean of the distribution, from 100,000 draws unless it is constant."""
        if self.constant is not None:
            return self.constant
        return float(self.sample(np.random.default_rng(0), 100_000).mean())
