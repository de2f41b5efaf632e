"""The Lightning callback: hooks -> schedule -> samples -> measure -> publish. The only importer of Lightning."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_hessian.curvature.options import ChunkSize, MethodChoice, Options
from lightning_hessian.errors import ConfigurationError, check_at_least, check_choice
from lightning_hessian.model.arguments import Target
from lightning_hessian.model.function import ForwardFunction, OutputFunction
from lightning_hessian.records.record import Stage
from lightning_hessian.records.retention import KeepMatrices, keep_policy
from lightning_hessian.training.measurement import Monitor, RunState, check_names
from lightning_hessian.training.resume import from_state, settings, to_state
from lightning_hessian.training.run import Visits
from lightning_hessian.training.samples import InputFunction, Samples, samples_from
from lightning_hessian.training.schedule import Budget, Place, Schedule
from lightning_hessian.training.trainer_access import (
    chosen_batch,
    first_validation_batch,
    in_both_packages,
    last_logged_step,
    logged_step,
    place,
    ranks,
    steps,
)
from lightning_hessian.writers.loggers import picture_loggers, tensorboard_loggers

if TYPE_CHECKING:
    _Callback = Callback
else:
    _Callback = in_both_packages(Callback)  # LightningCLI of either package asks for its own

NO_SAMPLES = (
    "no validation batch has come, and it is this rank's samples that are measured. Give samples=..., or every rank a "
    "validation batch."
)


class InputHessianMonitor(_Callback):
    """Measures how curved chosen outputs are around held-out inputs while a network trains.

    The Hessian of a class's target with respect to the *input* is measured sample by sample on a fixed
    samples: before training, at the end of chosen epochs, and at the end of the fit; in eval mode, in
    ``dtype``, without autocast, on the trainer's device. Training goes on bit for bit as without it.
    Eigenvalues, trace, norms, heatmaps and a diagnosis in words go to TensorBoard; the scalars go to every
    logger and into ``trainer.callback_metrics``; each measurement is saved under the log directory. A
    ``trainer.validate()`` or ``trainer.test()`` of its own ends with one measurement.

    Args:
        classes: which outputs: ``"label"`` (each sample's own), ``"predicted"``, ``"all"``, an int or ints.
        target: ``"logit"``, ``"log_prob"``, ``"prob"``, ``"loss"``, ``"margin"``, or a callable
            ``(outputs [N, C], classes [N, K]) -> [N, K]``. ``"auto"``: the output itself (``"logit"``), unless
            the network is piecewise linear in its input and has several outputs: then ``"prob"``.
        every_n_epochs: measure at the end of every n-th epoch; None: at none.
        epochs: measure at the end of exactly these epochs (from 0), in place of ``every_n_epochs``.
        every_n_train_steps: also measure after every n-th optimizer step.
        samples: the samples: a tensor ``[N, *shape]``, ``(x, labels)``, a map-style dataset, or None for the
            first validation batch (in ``trainer.test()``: test batch).
        val_dataloader_idx: from which loader that batch is taken, where there are several.
        sample_indices: which samples of the samples or of the first validation batch, in place of the first ones.
        num_samples: how many samples.
        heatmap_samples: for how many of them the whole matrix is drawn and kept.
        method: ``"auto"``, ``"dense"``, ``"low_rank"`` or ``"lanczos"``, as for ``input_spectrum``.
        num_eigenvalues: eigenvectors kept per problem; with ``"lanczos"`` the number of eigenvalues.
        density_vectors: with ``"lanczos"``, random starting vectors from which the density of eigenvalues is estimated
            for the histogram, 40 Hessian-vector products each; at least 2, or 0 for none. Elsewhere it is exact.
        dtype: ``"float32"`` or ``"float64"``.
        wrt: name of the submodule whose output is the variable, in place of the input (``"embedding"`` for tokens),
            or the key or position of one of several inputs.
        input_fn: ``batch -> x`` or ``batch -> (x, labels)``, for batches that are not ``(x, labels)``; x may be a
            dict (``module(**x)``) or tuple (``module(*x)``) of tensors. Of batches that are dicts, the only
            floating-point tensor is found without it, or all inputs where ``wrt`` names one of them.
        forward_fn: ``(module, x) -> output``, in place of ``module(x)``.
        output_fn: ``output -> [N, C]``, for modules that return neither that nor something that holds it as ``logits``.
        chunk_size: Hessian columns computed at once; ``"auto"``: found while working.
        max_memory: bytes a measurement may use; None: half of what is free.
        max_overhead: share of the training time that may go into measuring, such as 0.05; None: whatever it takes. A
            measurement is skipped where (seconds spent measuring so far, drawing and writing included) + (those of the
            last one) > ``max_overhead`` · (seconds of training so far, without measuring). The first one of a fit is
            always made. Skipping is told once, and counted in ``hessian_cost/skipped``.
        keep_matrices: whether saved files hold the whole matrices of the ``heatmap_samples``; an int n: at every n-th
            measurement; or ``KeepMatrices(every_n, storage, max_total_bytes)``, in YAML its fields. By default upper
            triangles (which are exact) up to 1 GiB a run. Where eigenvectors give the matrix, it is not kept besides.
        class_names: names of all classes, for pictures.
        on_error: ``"warn"``: a measurement that fails, or cannot be saved or shown, is told about and training goes on;
            ``"raise"``: it ends training at once, for which every measurement also waits until it is written.
        seed: of the monitor's own random directions.
        name: tells this monitor from others of the same Trainer: in tags (``hessian_trace/NAME_prob_class_3``), files,
            records and warnings.

    Checkpoints hold the samples and all that keeps curves of one kind; a run resumed from one goes on without a gap.

    Raises:
        MisconfigurationException: at construction or setup, naming the argument and what is allowed.

    Cost: see ``input_spectrum``; logged as ``hessian_cost/…``, and shown in the Trainer's progress bar where it takes
    longer than a second.

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
        epochs: Collection[int] | None = None,
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
        max_overhead: float | None = None,
        keep_matrices: bool | int | KeepMatrices = True,
        class_names: Sequence[str] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__()
        with _misconfiguration("InputHessianMonitor"):
            check_choice("on_error", on_error, ("warn", "raise"))
            check_at_least("num_samples", num_samples, 1)
            check_at_least("val_dataloader_idx", val_dataloader_idx, 0)
            keep = keep_policy(keep_matrices)
            self._schedule = Schedule(every_n_epochs, epochs, every_n_train_steps)
            self._budget = Budget(max_overhead)
            self._monitor = Monitor(
                classes=classes,
                target=target,
                dtype=dtype,
                options=Options(
                    method=method,
                    num_eigenvalues=num_eigenvalues,
                    chunk_size=chunk_size,
                    max_memory=max_memory,
                    seed=seed,
                    density_vectors=density_vectors,
                ),
                heatmap_samples=heatmap_samples,
                class_names=None if class_names is None else tuple(class_names),
                forward_fn=forward_fn,
                output_fn=output_fn,
                wrt=wrt,
                name=name,
            )
        self._given_samples = samples
        self._val_dataloader_idx = val_dataloader_idx
        self._how_to_samples = (num_samples, sample_indices, input_fn, wrt)
        self._settings = settings(self._monitor, samples, num_samples, sample_indices, val_dataloader_idx)
        self._visits = Visits(
            self._monitor,
            self._budget,
            keep_matrices=keep,
            on_error=on_error,
            warn=partial(rank_zero_warn, category=UserWarning),
            inform=rank_zero_info,
        )
        self._samples: Samples | None = None
        self._samples_failure: Exception | None = None
        self._samples_is_restored = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks what can be checked before training, and takes the samples where it was given."""
        if stage not in get_args(Stage):
            return
        self._samples, self._samples_failure, self._samples_is_restored = (
            None,
            None,
            False,
        )  # a monitor may serve several runs
        self._monitor.state = RunState()
        self._schedule.restart()
        self._schedule.place = Place(epoch=max(0, trainer.current_epoch - 1))  # of a trained model; a fit's is its own
        with self._misconfiguration():
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            check_names([c._monitor.name for c in callbacks if isinstance(c, InputHessianMonitor)])
            self._visits.restart(ranks(trainer))
            if self._given_samples is not None:
                self._samples = self._visits.ranks.first(lambda: self._take(self._given_samples))
            elif stage == "fit" and not trainer.enable_validation:
                raise ConfigurationError(
                    "There are no samples to measure at: there is no validation loader with a validation_step (or "
                    "limit_val_batches is 0), and no samples were given. Give samples=x, samples=(x, labels) "
                    "or samples=dataset."
                )
        if trainer.fast_dev_run:  # type: ignore[attr-defined] # set by Lightning's debugging flags
            self._visits.warn("fast_dev_run: measurements are made to test them, but nothing is saved or drawn.")
        elif not tensorboard_loggers(trainer.loggers) + picture_loggers(trainer.loggers):
            self._visits.warn(
                "No TensorBoard logger: scalars go to the loggers there are and records to files, but there are "
                "no pictures. Give Trainer(logger=TensorBoardLogger(...)) to see them."
            )

    @property
    def state_key(self) -> str:
        """One key for each name."""
        return self._generate_state_key(name=self._monitor.name)

    # Wrapped, since Lightning would refuse two monitors of one name before setup can say what to do.
    @wraps(Callback.state_dict)
    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The samples, what measurements hand on, and where the run is."""
        return to_state(self._samples, self._monitor.state, self._schedule, self._settings)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sets the place right where a callback before this one saves; waits for the files of what was measured."""
        self._visits.wait_for_files()
        if self._schedule.place.step != steps(trainer):
            checkpoint["callbacks"][self.state_key]["place"] = asdict(place(trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the checkpoint was; comes after ``setup``."""
        given = None if self._given_samples is None else self._samples
        resumed = from_state(state_dict, self._monitor, self._schedule, self._settings, given)
        self._samples, self._monitor.state = resumed.samples, resumed.run
        self._samples_is_restored = given is None and resumed.samples is not None
        if resumed.told is not None:
            self._visits.warn(resumed.told)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the samples from the first validation batch that passes."""
        if self._samples is not None:
            return
        with self._misconfiguration():
            try:
                chosen = chosen_batch(trainer, batch, dataloader_idx, self._val_dataloader_idx)
                if chosen is not None:
                    self._samples, self._samples_failure = self._take(chosen), None
            except Exception as error:
                if self._visits.ranks.size == 1 and steps(trainer) == 0:
                    raise
                self._samples_failure = error  # told at the next measurement, where all processes meet

    on_test_batch_start = on_validation_batch_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures once at the end of a ``trainer.validate()`` or ``trainer.test()``."""
        if trainer.state.fn != "fit":
            if self._samples is None:
                self._visits.warn("No measurement: no batch came from the loader val_dataloader_idx. Give samples=...")
            self._run(trainer, pl_module, logged_step(trainer))

    on_test_end = on_validation_end

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures before training, or what a killed run did not finish; finds a samples where no sanity check ran."""
        with self._misconfiguration():
            self._samples = self._visits.ranks.first(lambda: self._samples_before_training(trainer, pl_module))
        self._visits.begin(trainer)
        if self._samples is None:
            self._visits.warn(
                "No measurement before training: no validation batch has passed yet, and the first one cannot be had "
                "without disturbing its loader. Give samples=... to measure before training too."
            )
        elif self._schedule.missed(steps(trainer)):
            self._run(trainer, pl_module, self._schedule.place.logged_step)
        self._budget.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures after every n-th optimizer step, where asked to."""
        self._schedule.place = place(trainer)
        if self._schedule.after_step(steps(trainer)):
            self._run(trainer, pl_module, self._schedule.place.logged_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures at the end of chosen epochs, before Lightning's own monitoring callbacks look."""
        if self._schedule.at_epoch_end(trainer.current_epoch, steps(trainer)):
            self._run(trainer, pl_module, last_logged_step(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the final weights, if that was not done yet."""
        if self._schedule.is_new(steps(trainer)):
            self._run(trainer, pl_module, last_logged_step(trainer))
        self._visits.tell(self._visits.ranks.first(self._visits.flush))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes what was measured before training ended early."""
        self._visits.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes what is left, before the loggers are closed."""
        self._visits.close()

    def _run(self, trainer: Trainer, pl_module: LightningModule, step_of_loggers: int) -> None:
        with self._misconfiguration():
            try:
                self._samples = self._visits.ranks.agreed(self._known_samples, NO_SAMPLES)
            except Exception as error:  # of a batch that came after training had begun, or of another process
                self._visits.fail(error, trainer, step_of_loggers)
                return
            if self._samples is None:
                return
            self._visits.visit(
                trainer,
                pl_module,
                self._samples,
                logged_step=step_of_loggers,
                epoch=self._schedule.place.epoch,
                restored=self._samples_is_restored,
            )
        self._schedule.done(steps(trainer))  # only now: a checkpoint saved meanwhile must not call it done

    def _samples_before_training(self, trainer: Trainer, pl_module: LightningModule) -> Samples | None:
        samples = self._known_samples()
        batch = first_validation_batch(trainer, pl_module, self._val_dataloader_idx) if samples is None else None
        return samples if batch is None else self._take(batch)

    def _known_samples(self) -> Samples | None:
        if self._samples_failure is not None:
            raise self._samples_failure
        return self._samples

    def _take(self, source: Any) -> Samples:
        samples = samples_from(source, *self._how_to_samples)
        self._monitor.check(samples)
        num_samples, indices, *_ = self._how_to_samples
        if indices is None and len(samples) < num_samples:
            self._visits.warn(
                f"num_samples={num_samples}, but the batch or dataset has {len(samples)}: those are measured. Give "
                f"samples=... for more."
            )
        return samples

    def _misconfiguration(self) -> AbstractContextManager[None]:
        return _misconfiguration(self._monitor.title)


@contextmanager
def _misconfiguration(title: str) -> Iterator[None]:
    """Raises configuration errors as Lightning's own kind."""
    try:
        yield
    except ConfigurationError as error:
        raise in_both_packages(MisconfigurationException)(f"{title}: {error}") from error
