"""The samples are chosen without disturbing any loader, dataset or random stream."""

import random
from collections import UserDict

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_hessian.curvature.options import Options
from lightning_hessian.errors import ConfigurationError
from lightning_hessian.training import samples
from lightning_hessian.training.samples import SampleSource, first_batch
from lightning_hessian.training.settings import MeasurementSettings


def samples_from(source, num_samples, sample_indices=None, **options):
    return SampleSource(num_samples=num_samples, sample_indices=sample_indices, **options).select(source)


X, Y = torch.rand(10, 1, 4, 4), torch.arange(10)


class Stateful(Dataset):
    """Counts its reads and draws from streams of its own and from the global ones."""

    def __init__(self):
        self.data = X
        self.reads = 0
        self.generator = torch.Generator().manual_seed(3)
        self.random = random.Random(3)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        self.reads += 1
        noise = torch.rand(1, generator=self.generator) + self.random.random() + random.random() + torch.rand(1)
        return self.data[i] + noise + np.random.rand(), i  # noqa: NPY002

    def state(self):
        return self.reads, self.generator.get_state().tolist(), self.random.getstate()


def global_streams():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_first_batch_leaves_no_trace(shuffle):
    dataset, generator = Stateful(), torch.Generator().manual_seed(5)
    loader = DataLoader(dataset, batch_size=4, shuffle=shuffle, generator=generator)
    before = dataset.state(), generator.get_state().tolist(), global_streams()
    batch = first_batch(loader)
    assert (dataset.state(), generator.get_state().tolist(), global_streams()) == before
    assert len(batch[0]) == 4
    if not shuffle:
        assert batch[1].tolist() == [0, 1, 2, 3]


def test_what_a_dataset_writes_is_written_to_the_copy():
    class Writing(Dataset):
        def __init__(self):
            self.own = X.clone()

        def __len__(self):
            return 10

        def __getitem__(self, i):
            return self.own[i].mul_(2)

    dataset = Writing()
    batch = first_batch(DataLoader(dataset, batch_size=4))
    assert torch.equal(dataset.own, X)
    assert torch.equal(batch, 2 * X[:4])


def test_a_large_dataset_is_not_copied(monkeypatch):
    monkeypatch.setattr(samples, "LARGEST_COPY", X.nbytes - 1)
    assert first_batch(DataLoader(TensorDataset(X), batch_size=4)) is None


def test_a_dataset_that_cannot_be_copied_is_left_alone():
    dataset = Stateful()
    dataset.file = open(__file__)  # noqa: SIM115 - an open file cannot be copied
    assert first_batch(DataLoader(dataset, batch_size=4)) is None
    assert dataset.reads == 0
    dataset.file.close()


def test_a_given_dataset_draws_from_no_global_stream():
    before = global_streams()
    found = samples_from(TensorDataset(X, Y), 3)
    samples_from(Stateful(), 3)
    assert global_streams() == before
    assert torch.equal(found.inputs, X[:3])
    assert found.labels.tolist() == [0, 1, 2]


def test_the_samples_are_a_copy():
    x = X.clone()
    found = samples_from((x, Y), 4)
    x.zero_()
    assert torch.equal(found.inputs, X[:4])


def test_labels_are_integers_one_per_sample():
    assert samples_from((X, Y), 2).labels.tolist() == [0, 1]
    assert samples_from((X, Y.float()), 2).labels is None
    assert samples_from((X, X), 2).labels is None
    assert samples_from(X, 2).labels is None


def test_labels_of_other_samples_are_refused():
    """Whether they were given or made by an input_fn; a batch of a loader may hold other integers, such as lengths."""
    with pytest.raises(ConfigurationError, match=r"samples= holds 10 samples and 4 labels"):
        samples_from((X, Y[:4]), 2)
    with pytest.raises(ConfigurationError, match=r"input_fn returned 10 samples and 4 labels"):
        samples_from(X, 2, input_fn=lambda x: (x, Y[:4]))
    assert SampleSource(num_samples=2).select_from_batch((X, Y[:4])).labels is None


@pytest.mark.parametrize(
    "batch",
    [
        {"x": X, "y": X},
        {"x": X.byte()},
        {"labels": X},
        {},
        (),
        [Y],
        "text",
        (Y, X),
        ((), Y),
    ],
)
def test_a_batch_that_nobody_can_guess(batch):
    with pytest.raises(ConfigurationError, match=r"input was not found in .* Give input_fn"):
        samples_from(batch, 2)


def test_input_fn_must_give_a_batch():
    with pytest.raises(ConfigurationError, match=r"\(from input_fn\)"):
        samples_from({"x": X}, 2, input_fn=lambda batch: "x")


MASK, TOKENS = torch.ones(10, 4, dtype=torch.long), torch.arange(40).reshape(10, 4)


@pytest.mark.parametrize("name", ["labels", "label"])
def test_the_only_image_of_a_dict_is_found_with_its_labels(name):
    found = samples_from({"index": Y, "pixel_values": X, name: Y + 1, "path": ["a"] * 10}, 2)
    assert torch.equal(found.inputs, X[:2])
    assert found.labels.tolist() == [1, 2]
    assert samples_from(UserDict(image=X), 2).labels is None  # transformers' BatchEncoding is a UserDict


def test_all_inputs_of_a_dict_are_found_where_wrt_names_one():
    found = samples_from({"image": X, "mask": MASK, "labels": Y}, 3, [4, 1], wrt="image")
    assert list(found.inputs) == ["image", "mask"]
    assert torch.equal(found.inputs["image"], X[[4, 1]])
    assert torch.equal(found.inputs["mask"], MASK[[4, 1]])
    assert found.labels.tolist() == [4, 1]
    assert len(found) == 2
    assert found.shapes == "{'image': [2, 1, 4, 4], 'mask': [2, 4]}"


def test_the_only_tokens_of_a_dict_are_found_where_wrt_names_a_layer():
    found = samples_from({"input_ids": TOKENS, "labels": Y}, 2, wrt="embedding")
    assert torch.equal(found.inputs, TOKENS[:2])


@pytest.mark.parametrize(
    ("returned", "inputs", "labels"),
    [
        (({"input_ids": TOKENS, "mask": MASK}, Y), {"input_ids": TOKENS[:2], "mask": MASK[:2]}, [0, 1]),
        ({"input_ids": TOKENS, "mask": MASK}, {"input_ids": TOKENS[:2], "mask": MASK[:2]}, None),
        (((X, MASK), Y), (X[:2], MASK[:2]), [0, 1]),
        (([X, MASK], None), (X[:2], MASK[:2]), None),
    ],
)
def test_an_input_fn_may_give_several_inputs(returned, inputs, labels):
    found = samples_from("anything", 2, input_fn=lambda batch: returned)
    assert type(found.inputs) is type(inputs)
    torch.testing.assert_close(found.inputs, inputs, rtol=0, atol=0)
    assert (None if found.labels is None else found.labels.tolist()) == labels
    assert len(found) == 2


def test_several_inputs_have_one_row_per_sample():
    with pytest.raises(ConfigurationError, match=r"first dimensions are \[3, 10\].*forward_fn"):
        samples_from(((X, X[:3]), Y), 2, wrt=0)


def test_samples_taken_in_inference_mode_can_be_differentiated():
    with torch.inference_mode():
        found = samples_from((X * 1, Y * 1), 2)
    assert not found.inputs.is_inference()
    assert not found.labels.is_inference()


@pytest.mark.parametrize("indices", [[0, 2], range(0, 4, 2), torch.tensor([0, 2]), np.array([0, 2])])
def test_indices_of_any_kind(indices):
    x = torch.arange(8.0).reshape(4, 2)
    assert SampleSource(sample_indices=indices).select(x).inputs.tolist() == [[0, 1], [4, 5]]


@pytest.mark.parametrize("indices", [3, [0.5], [True, False], "01", torch.tensor([0.0])])
def test_what_is_no_index_is_refused_at_construction(indices):
    with pytest.raises(ConfigurationError, match=r"sample_indices=.* must be whole numbers, counted from 0"):
        SampleSource(sample_indices=indices)


def test_a_loader_in_place_of_samples():
    with pytest.raises(ConfigurationError, match=r"is a DataLoader. Give its dataset, samples=loader\.dataset"):
        SampleSource().select(DataLoader(TensorDataset(torch.rand(4, 2))))


def test_classes_from_numpy():
    settings = MeasurementSettings(np.array([1, 2]), "logit", "float32", Options())
    assert settings.classes == [1, 2]
    settings.check_samples(SampleSource().select(torch.rand(4, 2)))


@pytest.mark.parametrize("classes", [("a",), [0.5], np.array([0.5])])
def test_classes_that_are_no_whole_numbers_are_refused_at_construction(classes):
    with pytest.raises(ConfigurationError, match="must be whole numbers, or one of 'label'"):
        MeasurementSettings(classes, "logit", "float32", Options())
