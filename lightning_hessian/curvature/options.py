"""How to measure: the options of a measurement, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lightning_hessian.curvature.memory import available_memory
from lightning_hessian.errors import ConfigurationError, check_choice, store_whole_numbers, whole_number

MethodName = Literal["dense", "low_rank", "lanczos"]
MethodChoice = Literal["auto", "dense", "low_rank", "lanczos"]
ChunkSize = int | Literal["auto"]


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        check: whether results are compared with differences of values.
        method: ``"auto"`` or a method.
        num_eigenvalues: eigenvectors per problem; for ``lanczos`` the number of eigenvalues. ``low_rank`` gives the
            eigenvectors of all its eigenvalues where there are no more than 64 and memory allows.
        chunk_size: columns computed at once; ``"auto"``: found while working.
        max_memory: bytes that may be used; None: half of what is free on the device.
        max_seconds: within which a measurement is to end; None: no limit. See ``methods.duration`` for what is dropped.
        seed: of all random vectors, the same at every measurement: curves show the network, not the estimator.
        block_size: start vectors of ``lanczos``, which finds an eigenvalue at most that many times.
        density_vectors: starting vectors for the density of eigenvalues where ``lanczos`` finds only the ends of the
            spectrum; 0: no density there. Complete spectra have theirs without.

    Raises:
        ConfigurationError: a number is not positive, or the method is unknown.
    """

    method: MethodChoice = "auto"
    num_eigenvalues: int = 10
    chunk_size: ChunkSize = "auto"
    max_memory: int | None = None
    seed: int = 0
    block_size: int = 1
    density_vectors: int = 0
    check: bool = True
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(MethodChoice))
        store_whole_numbers(self, num_eigenvalues=1, block_size=1, seed=None)
        if self.chunk_size != "auto":
            store_whole_numbers(self, chunk_size=1)
        if self.max_memory is not None:
            store_whole_numbers(self, max_memory=1)
        seconds = self.max_seconds
        is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if seconds is not None and not (is_number and 0 < seconds < float("inf")):
            raise ConfigurationError(
                f"max_seconds={seconds!r} must be a positive number of seconds, or None for no limit."
            )
        try:
            num_vectors = whole_number("density_vectors", self.density_vectors, 0)
        except ConfigurationError:
            num_vectors = 1  # as little allowed
        if num_vectors == 1:
            raise ConfigurationError(
                f"density_vectors={self.density_vectors!r} must be 0 (no density) or a whole number of at least 2: the "
                f"standard error comes from the spread over starting vectors."
            )
        object.__setattr__(self, "density_vectors", num_vectors)

    def memory(self, device: torch.device) -> int:
        """The bytes that may be used on ``device``."""
        return self.max_memory or available_memory(device)

    def generator(self) -> torch.Generator:
        """A fresh generator, so that the run's own random streams are left alone."""
        return torch.Generator().manual_seed(self.seed)
