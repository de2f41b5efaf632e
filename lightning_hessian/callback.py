"""The Lightning callback: hooks, and nothing else. The only importer of Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_hessian.curvature.options import ChunkSize, MethodChoice
from lightning_hessian.errors import ConfigurationError
from lightning_hessian.model.arguments import Target
from lightning_hessian.model.function import ForwardFunction
from lightning_hessian.model.outputs import OutputFunction
from lightning_hessian.records.record import Record, Stage
from lightning_hessian.records.retention import KeepMatrices
from lightning_hessian.training.batch import InputFunction
from lightning_hessian.training.schedule import Schedule
from lightning_hessian.training.settings import check_names, monitor_settings
from lightning_hessian.training.trainer_access import in_both_packages, last_logged_step
from lightning_hessian.training.trainer_run import TrainerRun

if TYPE_CHECKING:
    _Callback = Callback
else:
    _Callback = in_both_packages(Callback)  # LightningCLI of either package asks for its own


class InputHessianMonitor(_Callback):
    """Measures how curved chosen outputs are around fixed held-out inputs while a network trains.

    For each sample x, the Hessian ∇²ₓ t(x, k) of a target t of the output for class k is measured with respect to the
    *input*; nothing is summed over the batch. By default this happens before training, at the end of every epoch and at
    the end of the fit; a standalone ``trainer.validate()`` or ``trainer.test()`` triggers one measurement. The model is
    measured in eval mode, in ``dtype``, without autocast, on the trainer's device. Training stays bit for bit as it is
    without the monitor.

    Eigenvalues, trace, norms, heatmaps and a diagnosis in words go to TensorBoard; scalars go to every logger and into
    ``trainer.callback_metrics``; each measurement is saved under the log directory. Invalid settings raise before
    training. Failures while measuring, saving or plotting warn once, and training continues. Checkpoints hold the
    samples and what keeps curves comparable, so that a resumed run continues without a gap.

    Args:
        classes: which outputs: ``"label"`` (each sample's own), ``"predicted"``, ``"all"``, an int or ints.
        target: the scalar that is differentiated: ``"logit"``, ``"log_prob"``, ``"prob"``, ``"loss"``, ``"margin"``, or
            a callable ``(outputs [N, C], classes [N, K]) -> [N, K]``. ``"auto"``: the output itself (``"logit"``), or
            ``"prob"`` if the network is piecewise linear in its input and has several outputs.
        every_n_epochs: measure at the end of every n-th epoch; None: never.
        epochs: measure at the end of exactly these epochs (counted from 0), instead of ``every_n_epochs``.
        every_n_train_steps: also measure after every n-th optimizer step.
        samples: a tensor ``[N, *shape]``, ``(x, labels)``, a map-style dataset, or None for the first validation batch
            (in ``trainer.test()``: test batch).
        val_dataloader_idx: the loader from which that batch is taken, where there are several.
        sample_indices: which samples of ``samples`` or of the first validation batch to use, instead of the first ones.
        num_samples: the number of samples.
        heatmap_samples: the number of samples whose whole matrices are drawn and saved.
        method: ``"auto"``, ``"dense"``, ``"low_rank"`` or ``"lanczos"``, as for ``input_spectrum``.
        num_eigenvalues: eigenvectors saved per sample and class; with ``"lanczos"``, the number of eigenvalues.
        density_vectors: with ``"lanczos"``, the number of random starting vectors from which the density of eigenvalues
            is estimated for the histogram, at 40 Hessian-vector products each; at least 2, or 0 for no density. The
            other methods give it exactly.
        dtype: ``"float32"`` or ``"float64"``.
        wrt: the submodule whose output is differentiated instead of the input (``"embedding"`` for tokens), by name;
            or the key or position of one of several inputs.
        input_fn: ``batch -> x`` or ``batch -> (x, labels)``, for batches that are not ``(x, labels)``; x may be a dict
            (``module(**x)``) or tuple (``module(*x)``) of tensors. Without it, a batch that is a dict, a dataclass or
            another object must hold exactly one floating-point input (not counting masks and labels), or ``wrt`` must
            name one of its inputs.
        forward_fn: ``(module, x) -> output``, instead of ``module(x)``.
        output_fn: ``output -> [N, C]``, for modules that return neither such a tensor nor an object with ``logits``.
        chunk_size: Hessian columns computed at once; ``"auto"``: the fastest number, found while measuring.
        max_memory: bytes that a measurement may use; None: half of the free memory.
        max_seconds: time limit of each measurement; None: no limit, and nothing depends on a clock. To keep it,
            heatmaps are dropped first, then random vectors (standard errors grow), then Lanczos steps (residuals grow,
            and eigenvalues that have not converged are marked); the diagnosis says what was dropped. With
            ``method="dense"``, which cannot be shortened, such a measurement fails.
        max_overhead: largest share of the training time that measuring may take, such as 0.05; None: no limit. A
            measurement is skipped if (seconds spent measuring so far, drawing and writing included) + (seconds of
            the last measurement) > ``max_overhead`` · (seconds of training so far, measuring excluded). The first one
            is always made. Skipping warns once, and is counted in ``hessian_cost/skipped``.
        keep_matrices: whether saved records hold the whole matrices of the ``heatmap_samples``; a whole number n: those
            of every n-th measurement; or a ``KeepMatrices`` (in YAML, its fields). By default, exact upper triangles of
            up to 1 GiB per run. A matrix that the saved eigenvectors reproduce is not saved as well.
        class_names: names of all classes, for pictures.
        on_error: ``"warn"``: if a measurement fails or cannot be saved or shown, warn and continue training.
            ``"raise"``: end training at once; every measurement then also waits until it is written.
        seed: of the random directions, which are the same at every measurement.
        name: distinguishes this monitor from others of the same Trainer: in tags
            (``hessian_trace/NAME_prob_class_3``), files, records and warnings.

    Raises:
        MisconfigurationException: at construction or setup; names the argument and what is allowed.

    Cost: see ``input_spectrum``; logged as ``hessian_cost/…``, and shown in the Trainer's progress bar where a
    measurement takes longer than a second.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_hessian import InputHessianMonitor
        >>> monitor = InputHessianMonitor(classes=[2, 3], every_n_epochs=1, num_samples=8)
        >>> trainer = Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        classes: int | Sequence[int] | str = "label",
        target: Target | Literal["auto"] = "auto",
        *,
        every_n_epochs: int | None = 1,
        epochs: Sequence[int] | Set[int] | None = None,  # not Collection, which old jsonargparse refuses
        every_n_train_steps: int | None = None,
        samples: Any = None,
        val_dataloader_idx: int = 0,
        sample_indices: Sequence[int] | None = None,
        num_samples: int = 8,
        heatmap_samples: int = 1,
        method: MethodChoice = "auto",
        num_eigenvalues: int = 10,
        density_vectors: int = 0,
        dtype: Literal["float32", "float64"] = "float32",
        wrt: str | int | None = None,
        input_fn: InputFunction | None = None,
        forward_fn: ForwardFunction | None = None,
        output_fn: OutputFunction | None = None,
        chunk_size: ChunkSize = "auto",
        max_memory: int | None = None,
        max_seconds: float | None = None,
        max_overhead: float | None = None,
        keep_matrices: bool | int | KeepMatrices = True,
        class_names: Sequence[str] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__()
        with _misconfiguration("InputHessianMonitor"):
            self._settings = monitor_settings(
                "InputHessianMonitor",
                Schedule(every_n_epochs, epochs, every_n_train_steps),
                {
                    "classes": classes,
                    "target": target,
                    "samples": samples,
                    "val_dataloader_idx": val_dataloader_idx,
                    "sample_indices": sample_indices,
                    "num_samples": num_samples,
                    "heatmap_samples": heatmap_samples,
                    "method": method,
                    "num_eigenvalues": num_eigenvalues,
                    "density_vectors": density_vectors,
                    "dtype": dtype,
                    "wrt": wrt,
                    "input_fn": input_fn,
                    "forward_fn": forward_fn,
                    "output_fn": output_fn,
                    "chunk_size": chunk_size,
                    "max_memory": max_memory,
                    "max_seconds": max_seconds,
                    "max_overhead": max_overhead,
                    "keep_matrices": keep_matrices,
                    "class_names": class_names,
                    "on_error": on_error,
                    "seed": seed,
                    "name": name,
                },
            )
        self._current_run: TrainerRun | None = None
        self._early_state: dict[str, Any] = {}  # of a checkpoint that was loaded before there was a run

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_current_run": None}  # a run belongs to its Trainer, in this process

    @property
    def _run(self) -> TrainerRun:
        assert self._current_run is not None, "setup comes before all other hooks"
        return self._current_run

    @property
    def last_record(self) -> Record | None:
        """The last measurement of this ``fit``, ``validate`` or ``test``, or of the one before if none is running.

        It holds everything but the whole matrices; ``load_records(trainer.log_dir)[-1]`` has those that were saved.
        None before the first measurement, and on processes other than the first.
        """
        return None if self._current_run is None else self._current_run.last_record

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts a run: checks what can be checked before training, and selects the samples if they were given."""
        if stage not in get_args(Stage):
            return
        with self._misconfiguration():
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # set outside of __init__
            check_names([c._settings.measurement.name for c in callbacks if isinstance(c, InputHessianMonitor)])
            warn = partial(rank_zero_warn, category=UserWarning)
            before = None if stage == "fit" else self._current_run
            self._current_run = TrainerRun(self._settings, trainer, warn=warn, inform=rank_zero_info, before=before)
        if self._early_state:
            self._run.load_state_dict(self._early_state)
            self._early_state = {}

    @property
    def state_key(self) -> str:
        """One key for each name."""
        return self._generate_state_key(name=self._settings.measurement.name)

    # Wrapped, since Lightning would reject two monitors of the same name before setup can say what to do.
    @wraps(Callback.state_dict)
    def state_dict(self) -> dict[str, Any]:  # type: ignore[override] # wrapped
        """The samples, what measurements pass on, and the position in training; empty before the first run."""
        return self._early_state if self._current_run is None else self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a checkpoint; Lightning calls it after ``setup``."""
        if self._current_run is None:
            self._early_state = state_dict
        else:
            self._run.load_state_dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Completes the saved state, and waits for the files of what was measured."""
        if self._current_run is not None:
            with self._guarded(trainer):
                self._run.complete_checkpoint(trainer, checkpoint["callbacks"].get(self.state_key, {}))

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes the samples from the first validation batch, if none were given."""
        with self._guarded(trainer):
            self._run.take_batch(trainer, batch, dataloader_idx)

    on_test_batch_start = on_validation_batch_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures once at the end of a standalone ``trainer.validate()`` or ``trainer.test()``."""
        if trainer.state.fn != "fit":
            with self._guarded(trainer):
                self._run.measure(trainer, pl_module)

    on_test_end = on_validation_end

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures before training, or makes the measurement that was missed when a resumed run was interrupted."""
        with self._guarded(trainer):
            if self._run.start_fit(trainer):
                self._run.measure(trainer, pl_module)
        self._run.start_clock()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures after every n-th optimizer step."""
        with self._guarded(trainer):
            if self._run.is_due_after_batch(trainer):
                self._run.measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures at the end of chosen epochs, before callbacks such as EarlyStopping read the metrics."""
        with self._guarded(trainer):
            if self._run.is_due_after_epoch(trainer):
                self._run.measure(trainer, pl_module, last_logged_step(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the final weights, if that was not done yet; says so if nothing was measured."""
        with self._guarded(trainer):
            if self._run.is_new(trainer):
                self._run.measure(trainer, pl_module, last_logged_step(trainer))
            self._run.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes what was measured before training ended early."""
        if self._current_run is not None:
            with self._guarded(trainer, ending=True):
                self._run.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes what is left, before the loggers are closed."""
        if self._current_run is not None:
            with self._guarded(trainer, ending=True):
                self._run.close()

    @contextmanager
    def _guarded(self, trainer: Trainer, *, ending: bool = False) -> Iterator[None]:
        """Lets an exception end the run only where ``on_error`` says so, or before training, for wrong settings."""
        with self._misconfiguration():
            try:
                yield
            except Exception as error:
                if not ending and self._run.must_raise(error, trainer):
                    raise
                self._run.survive(error)

    def _misconfiguration(self) -> AbstractContextManager[None]:
        return _misconfiguration(self._settings.measurement.title)


@contextmanager
def _misconfiguration(title: str) -> Iterator[None]:
    """Raises configuration errors as Lightning's own kind."""
    try:
        yield
    except ConfigurationError as error:
        raise in_both_packages(MisconfigurationException)(f"{title}: {error}") from error
