"""The callback in real training runs; what it logged is read back from the event file."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support import training
from support.training import Classifier, Stream, TurnsNaN, digits, events, fit, scalar
from torch import nn

from lightning_hessian import input_spectrum, load_records
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse

SUFFIXES = ("logit_class_2", "logit_class_3")


def small_monitor(**arguments):
    """A monitor without pictures, which take most of the time of such a run, unless a test looks at them."""
    return training.small_monitor(**{"heatmap_samples": 0, **arguments})


def test_everything_is_in_the_event_file(tmp_path):
    trainer = fit(tmp_path, small_monitor(heatmap_samples=1))
    tags = events(tmp_path).Tags()
    for suffix in SUFFIXES:
        for metric in (
            "lambda_max",
            "lambda_min",
            "spectral_norm",
            "trace",
            "frobenius_norm",
            "gradient_norm",
            "normalized_curvature",
            "linear_radius",
        ):
            assert f"hessian_{metric}/{suffix}" in tags["scalars"]
            assert f"hessian_spread/{metric}_{suffix}_p10" in tags["scalars"]
            assert f"hessian_spread/{metric}_{suffix}_p90" in tags["scalars"]
            assert f"hessian_{metric}/{suffix}" in trainer.callback_metrics
    assert set(tags["images"]) == {f"hessian/{suffix}" for suffix in SUFFIXES}
    assert set(tags["histograms"]) == {f"hessian_spectrum_signed_log10/{suffix}" for suffix in SUFFIXES}
    assert "hessian_diagnosis/text_summary" in tags["tensors"]
    assert "hessian_cost/seconds" in tags["scalars"]


def test_scalars_are_the_records_numbers_at_lightnings_own_steps(tmp_path):
    fit(tmp_path, small_monitor())
    records = load_records(tmp_path)
    assert [r.step for r in records] == [0, 4, 8]
    logged = scalar(tmp_path, "hessian_lambda_max/logit_class_3")
    assert list(logged) == [0, *scalar(tmp_path, "val_loss")] == [r.logged_step for r in records]
    np.testing.assert_allclose(list(logged.values()), [r.lambda_max[:, 1].mean() for r in records], rtol=1e-6)
    low = scalar(tmp_path, "hessian_spread/trace_logit_class_2_p10")
    np.testing.assert_allclose(list(low.values()), [np.percentile(r.trace[:, 0], 10) for r in records], rtol=1e-5)


def test_the_numbers_are_those_of_the_function(tmp_path):
    trainer = fit(tmp_path, small_monitor(heatmap_samples=1), precision="bf16-mixed")
    record = load_records(tmp_path)[-1]
    x, _ = digits(64, 66).tensors
    assert np.array_equal(record.x, x.numpy())
    expected = input_spectrum(trainer.lightning_module, x, [2, 3])
    np.testing.assert_allclose(record.eigenvalues, expected.eigenvalues.numpy(), atol=1e-6)
    np.testing.assert_allclose(record.linear_radius, expected.linear_radius.numpy(), rtol=1e-4)
    assert record.hessian.shape == (1, 2, 64, 64)
    np.testing.assert_allclose(np.linalg.eigvalsh(record.hessian[0, 1])[::-1], record.eigenvalues[0, 1], atol=1e-5)


def test_histogram_counts_every_eigenvalue(tmp_path):
    fit(tmp_path, small_monitor())
    histogram = events(tmp_path).Histograms("hessian_spectrum_signed_log10/logit_class_2")[-1].histogram_value
    assert histogram.num == pytest.approx(64)  # of a mean sample
    assert sum(histogram.bucket) == pytest.approx(64)


def test_histogram_of_an_estimated_density_counts_the_eigenvalues_of_a_mean_sample(tmp_path):
    fit(
        tmp_path, small_monitor(method="lanczos", num_eigenvalues=4, density_vectors=2, heatmap_samples=0), max_epochs=1
    )
    histogram = events(tmp_path).Histograms("hessian_spectrum_signed_log10/logit_class_2")[-1].histogram_value
    assert histogram.num == pytest.approx(64, rel=1e-5)
    assert sum(histogram.bucket) == pytest.approx(64, rel=1e-5)
    record = load_records(tmp_path)[-1]
    assert record.density_nodes.shape == record.density_weights.shape == (2, 2, 2, 40)
    assert record.made_with["density_vectors"] == 2


def test_subspace_overlap_is_logged_from_the_second_measurement_of_each_run_on(tmp_path):
    monitor = small_monitor()
    for folder in (tmp_path / "one", tmp_path / "two"):
        fit(folder, monitor)
        first, *others = load_records(folder)
        assert np.isnan(first.top_eigenvector_cosine).all()
        logged = scalar(folder, "hessian_top_subspace_overlap/logit_class_2")
        expected = {r.logged_step: np.nanmean(r.top_subspace_overlap[:, 0]) for r in others}
        assert logged == pytest.approx(expected, rel=1e-6)
        assert all(0 < v < 1 for v in logged.values())


def test_early_stopping_can_watch_the_curvature(tmp_path):
    stop = EarlyStopping(monitor="hessian_lambda_max/logit_class_3", mode="min", patience=1)
    trainer = fit(tmp_path, stop, small_monitor(), max_epochs=20)
    assert trainer.current_epoch < 20
    last = scalar(tmp_path, "hessian_lambda_max/logit_class_3")
    assert float(stop.best_score) == pytest.approx(min(list(last.values())[1:]))


def test_relu_measures_prob_and_says_why_once(tmp_path):
    with pytest.warns(UserWarning, match="piecewise linear.*measures 'prob'") as caught:
        fit(tmp_path, small_monitor(), model=Classifier(nn.ReLU))
    assert sum("piecewise" in str(w.message) for w in caught) == 1
    records = load_records(tmp_path)
    assert {r.target for r in records} == {"prob"}
    assert {r.network for r in records} == {"piecewise_linear"}
    assert "hessian_lambda_max/prob_class_3" in events(tmp_path).Tags()["scalars"]


def test_a_network_is_classified_once_where_the_target_is_chosen(tmp_path, monkeypatch):
    classified, hvp_of_outputs = [], ReverseOverReverse.hvp_of_outputs

    def counted(autodiff, weights, v):
        classified.append(autodiff)
        return hvp_of_outputs(autodiff, weights, v)

    monkeypatch.setattr(ReverseOverReverse, "hvp_of_outputs", counted)
    with pytest.warns(UserWarning, match="measures 'prob'"):
        fit(tmp_path, small_monitor(), model=Classifier(nn.ReLU), max_epochs=1)
    assert len(classified) == len(load_records(tmp_path)) == 2


def test_relu_logits_are_zero_and_explained(tmp_path):
    fit(tmp_path, small_monitor(heatmap_samples=1, target="logit"), model=Classifier(nn.ReLU))
    record = load_records(tmp_path)[-1]
    assert not record.eigenvalues.any()
    assert not record.matrix(0, 2).any()
    assert "Hessian is exactly zero there. This is correct" in record.message
    text = events(tmp_path).Tensors("hessian_diagnosis/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "piecewise linear" in text
    assert set(scalar(tmp_path, "hessian_lambda_max/logit_class_2").values()) == {0.0}
    assert "hessian_linear_radius/logit_class_2" not in events(tmp_path).Tags()["scalars"]


@pytest.mark.parametrize(("classes", "column"), [("label", "label"), ("predicted", "predicted"), (3, "class_3")])
def test_the_ways_to_choose_classes(tmp_path, classes, column):
    fit(tmp_path, small_monitor(classes=classes, target="prob"), max_epochs=1)
    record = load_records(tmp_path)[-1]
    assert f"hessian_trace/prob_{column}" in events(tmp_path).Tags()["scalars"]
    expected = {"label": record.labels, "predicted": record.predicted, 3: [3, 3]}[classes]
    assert record.classes[:, 0].tolist() == list(expected)


def test_all_classes(tmp_path):
    fit(tmp_path, small_monitor(classes="all", class_names=list("abcdefghij")), max_epochs=1)
    record = load_records(tmp_path)[-1]
    assert record.class_ids == tuple(range(10))
    assert record.class_name(0, 3) == "d"


NO_LOADER = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

X, Y = digits(200, 210).tensors


@NO_LOADER
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"samples": X}, [0, 1]),
        ({"samples": (X, Y)}, [0, 1]),
        ({"samples": digits(200, 210), "sample_indices": [7, 1, 3]}, [7, 1, 3]),
        ({"samples": {"a": X}, "input_fn": lambda batch: batch["a"]}, [0, 1]),
    ],
)
def test_given_samples(tmp_path, arguments, expected):
    fit(tmp_path, small_monitor(**arguments), held_out=False)
    assert all(np.array_equal(r.x, X[expected].numpy()) for r in load_records(tmp_path))


def test_sample_indices_of_the_first_validation_batch(tmp_path):
    fit(tmp_path, small_monitor(sample_indices=[5, 2]))
    x, y = digits(64, 96).tensors
    record = load_records(tmp_path)[0]
    assert np.array_equal(record.x, x[[5, 2]].numpy())
    assert np.array_equal(record.labels, y[[5, 2]].numpy())


def test_the_samples_are_the_same_without_a_sanity_check(tmp_path):
    fit(tmp_path / "with", small_monitor())
    fit(tmp_path / "without", small_monitor(), num_sanity_val_steps=0)
    first, second = (load_records(tmp_path / name) for name in ("with", "without"))
    assert [r.step for r in second] == [r.step for r in first]
    assert np.array_equal(first[0].x, second[0].x)
    assert np.array_equal(first[0].eigenvalues, second[0].eigenvalues)


def test_a_stream_is_not_read_ahead(tmp_path):
    with pytest.warns(UserWarning, match="No measurement before training.*Give samples="):
        fit(tmp_path, small_monitor(), held_out=Stream(), num_sanity_val_steps=0)
    assert [r.step for r in load_records(tmp_path)] == [4, 8]


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({"every_n_epochs": 2}, [0, 8, 12]),
        ({"epochs": [0]}, [0, 4, 12]),
        ({"epochs": np.arange(1, 3)}, [0, 8, 12]),
        ({"every_n_epochs": None}, [0, 12]),
        ({"every_n_epochs": None, "every_n_train_steps": 5}, [0, 5, 10, 12]),
    ],
)
def test_when_it_measures(tmp_path, schedule, steps):
    fit(tmp_path, small_monitor(**schedule), max_epochs=3)
    assert [r.step for r in load_records(tmp_path)] == steps


def test_other_loggers_get_the_scalars_and_one_warning_that_there_are_no_pictures(tmp_path):
    with pytest.warns(UserWarning, match="No TensorBoard logger"):
        fit(tmp_path, small_monitor(heatmap_samples=1), logger=CSVLogger(tmp_path, name="", version=""))
    assert "hessian_trace/logit_class_2" in (tmp_path / "metrics.csv").read_text()
    assert len(load_records(tmp_path)) == 3


def test_no_logger_still_gives_files_and_callback_metrics(tmp_path):
    with pytest.warns(UserWarning, match="No TensorBoard logger"):
        trainer = fit(tmp_path, small_monitor(heatmap_samples=1), logger=False)
    assert len(load_records(tmp_path)) == 3
    assert "hessian_trace/logit_class_2" in trainer.callback_metrics


def test_fast_dev_run_measures_and_writes_nothing(tmp_path):
    with pytest.warns(UserWarning, match="fast_dev_run.*nothing is saved"):
        trainer = fit(tmp_path, small_monitor(heatmap_samples=1), fast_dev_run=True)
    assert "hessian_trace/logit_class_2" in trainer.callback_metrics
    assert not list(tmp_path.rglob("*.safetensors"))


def test_nan_weights_warn_and_are_not_written(tmp_path):
    with pytest.warns(UserWarning, match="no measurement at step 8.*not finite.*NaN in the weights") as caught:
        trainer = fit(tmp_path, small_monitor(on_error="warn"), model=TurnsNaN(), max_epochs=3)
    assert trainer.current_epoch == 3
    assert sum("no measurement" in str(w.message) for w in caught) == 1
    assert [r.step for r in load_records(tmp_path)] == [0, 4]
    assert list(scalar(tmp_path, "hessian_trace/logit_class_2")) == [0, 3]
    text = events(tmp_path).Tensors("hessian_diagnosis/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "No measurement here" in text


def test_on_error_raise(tmp_path):
    with pytest.raises(RuntimeError, match="not finite"):
        fit(tmp_path, small_monitor(), model=TurnsNaN())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"target": "logits"}, "target='logits' is not known. Choose one of 'auto', 'logit'"),
        ({"classes": "labels"}, "classes='labels' is not known. Choose one of 'label'"),
        ({"num_samples": 0}, "num_samples=0 must be a whole number of at least 1"),
        ({"heatmap_samples": -1}, "heatmap_samples=-1"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"every_n_train_steps": 1.5}, "every_n_train_steps=1.5"),
        ({"epochs": [-1]}, r"epochs=\[-1\]"),
        ({"epochs": 3}, "epochs=3 must be whole numbers, counted from 0"),
        ({"method": "fast"}, "method='fast'"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_construction_raises(arguments, sentence):
    with pytest.raises(MisconfigurationException, match=sentence):
        small_monitor(**arguments)


class Dicts(Classifier):
    """Batches are dicts."""

    def validation_step(self, batch, batch_idx):
        pass


@NO_LOADER
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"held_out": False}, "no validation loader.*Give samples="),
        ({"limit_val_batches": 0}, "limit_val_batches is 0.*Give samples="),
    ],
)
def test_no_samples_to_measure_at(tmp_path, arguments, sentence):
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(tmp_path, small_monitor(), **arguments)


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize(
    ("held_out", "arguments", "sentence"),
    [
        (
            [{"left": x, "right": -x} for x in X],
            {},
            r"dict \{'left': .* \[10, 1, 8, 8\], 'right': .*input_fn=lambda batch",
        ),
        (list(X), {"classes": "label"}, "classes='label' needs integer labels"),
        (list(zip((16 * X).byte(), Y, strict=True)), {}, "torch.uint8.*floating point"),
        (digits(64, 96), {"classes": 10}, "classes=10 is out of range: the model has 10 outputs"),
        (digits(64, 96), {"class_names": ["a"]}, "class_names has 1 names.*10 outputs"),
        (digits(64, 96), {"sample_indices": [99]}, r"sample_indices=\[99\] is out of range: there are 16"),
        (digits(64, 96), {"output_fn": lambda z: z[:, :, None]}, r"output_fn returned .* shape \(2, 10, 1\)"),
    ],
)
def test_bad_input_raises_before_training(tmp_path, held_out, arguments, sentence, sanity):
    model = Dicts()
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(
            tmp_path,
            small_monitor(**{"on_error": "warn", **arguments}),
            model=model,
            held_out=held_out,
            num_sanity_val_steps=sanity,
        )
    assert model.flags == []  # no training step was made


def test_a_dataset_index_out_of_range(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"sample_indices=\[10\].*the dataset has 10 samples"):
        fit(tmp_path, small_monitor(samples=digits(200, 210), sample_indices=[10]))


def test_the_samples_are_fixed_for_the_whole_run(tmp_path):
    fit(tmp_path, small_monitor(), val_check_interval=0.5)
    assert len({r.x.tobytes() for r in load_records(tmp_path)}) == 1


class Watching(Callback):
    """Notes at every epoch's end the step that the monitor measured last."""

    def __init__(self, monitor):
        self.monitor, self.steps = monitor, []

    def on_validation_start(self, trainer, pl_module):
        record = self.monitor.last_record
        self.steps.append(None if record is None else record.step)


def test_the_last_record_is_at_hand_during_a_run_and_after_it(tmp_path):
    monitor = small_monitor(heatmap_samples=1)
    assert monitor.last_record is None
    watching = Watching(monitor)
    fit(tmp_path, monitor, watching)
    assert watching.steps == [None, 0, 4]  # in the sanity check, and in both epochs
    saved = load_records(tmp_path)[-1]
    assert monitor.last_record.step == saved.step == 8
    assert np.array_equal(monitor.last_record.eigenvalues, saved.eigenvalues)
    assert monitor.last_record.hessian is None
    assert saved.hessian is not None


def test_a_monitor_can_serve_a_second_run(tmp_path):
    monitor = small_monitor()
    fit(tmp_path / "first", monitor)
    fit(tmp_path / "second", monitor, held_out=digits(300, 332))
    x, _ = digits(300, 302).tensors
    assert [r.step for r in load_records(tmp_path / "second")] == [0, 4, 8]
    assert np.array_equal(load_records(tmp_path / "second")[0].x, x.numpy())
    assert any("custom_scalars" in tag for tag in events(tmp_path / "second").Tags()["tensors"])


class RawOptimizer(Classifier):
    """Steps an optimizer that Lightning does not count."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        super().training_step(batch, batch_idx).backward()
        optimizer.step()


def test_raw_optimizers_are_measured_too(tmp_path):
    fit(tmp_path, small_monitor(), model=RawOptimizer())
    assert [r.step for r in load_records(tmp_path)] == [0, 4, 8]


class Logging(Classifier):
    """Logs inside its forward."""

    def forward(self, x):
        self.log("inside", x.mean())
        return super().forward(x)


def test_a_log_in_the_forward_is_silent_while_measuring(tmp_path):
    with_monitor = fit(tmp_path / "a", small_monitor(), model=Logging()).callback_metrics["inside"]
    assert torch.equal(with_monitor, fit(tmp_path / "b", model=Logging()).callback_metrics["inside"])


def test_few_samples_warn(tmp_path):
    with pytest.warns(UserWarning, match="num_samples=100, but the batch has only 16"):
        fit(tmp_path, small_monitor(num_samples=100), max_epochs=1)


def test_the_log_says_once_which_method_was_chosen_and_why(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("lightning_hessian.callback.rank_zero_info", messages.append)
    fit(tmp_path, small_monitor())
    (choice,) = [message for message in messages if "method" in message]
    assert "method dense (D = 64 is small enough for whole matrices)" in choice
