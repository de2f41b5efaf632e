"""Batches as people have them: the input where it is unambiguous, else the structure and the argument that fits."""

import dataclasses
import re
from collections import UserDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_hessian.errors import ConfigurationError
from lightning_hessian.training.batch_structure import structure
from lightning_hessian.training.samples import SampleSource

X, Y = torch.rand(10, 3, 4, 4), torch.arange(10)
TOKENS = torch.arange(80).reshape(10, 8)
MASK = TOKENS > 3


@dataclasses.dataclass
class Images:
    image: torch.Tensor
    mask: torch.Tensor
    target: torch.Tensor


class Named(NamedTuple):
    index: torch.Tensor
    image: torch.Tensor
    label: torch.Tensor


class Short(NamedTuple):
    picture: torch.Tensor
    digit: torch.Tensor


class Plain:
    def __init__(self):
        self.x, self.y, self._seen = X, Y, X


class InSlots:
    __slots__ = ("_seen", "unset", "x", "y")

    def __init__(self, x, y):
        self.x, self.y, self._seen = x, y, x


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    label: int


class Graphs:
    """Has the manners of PyTorch Geometric's ``Batch``."""

    def __init__(self, **stored):
        self.stored = stored

    def keys(self):
        return list(self.stored)

    def __len__(self):
        return 4

    def __getitem__(self, key):
        return self.stored[key]

    def __call__(self):
        raise AssertionError


GRAPHS = Graphs(x=torch.rand(40, 3), edge_index=torch.zeros(2, 80, dtype=torch.long), y=Y[:4])


def found_in(batch, **options):
    return SampleSource(num_samples=2, **options).select_from_batch(batch)


UNAMBIGUOUS = [
    ({"image": X, "mask": (X[:, 0] * 9).long()}, None),
    ({"image": X, "mask": X[:, :1], "target": Y}, [0, 1]),
    ({"pixel_values": X, "pixel_mask": MASK, "labels": [{"boxes": X}]}, None),
    (Images(X, X[:, :1], Y), [0, 1]),
    (Named(Y, X, Y + 3), [3, 4]),
    (Short(X, Y), [0, 1]),
    (Plain(), [0, 1]),
    (UserDict(image=X, y=Y), [0, 1]),
    ([[X], Y], [0, 1]),
    ([[X, Y]], [0, 1]),
    (({"image": X}, Y), [0, 1]),
    (({"image": X, "label": Y},), [0, 1]),
    ({"image": X, "target": torch.rand(10, 2)}, None),
    (InSlots(X, Y), [0, 1]),
    (({"image": X, "path": ["a"] * 10}, Y), [0, 1]),
    ([[[X, Y]]], [0, 1]),
    ((X, torch.rand(10, 1)), None),
    ((X, Y, torch.rand(10)), [0, 1]),
]


@pytest.mark.parametrize(
    ("wrt", "batch", "labels"),
    [
        *((None, *case) for case in UNAMBIGUOUS),
        # a dict beside labels is left out: the layer's module may take the dict's names
        *(("layer", *case) for case in UNAMBIGUOUS if not (type(case[0]) is tuple and isinstance(case[0][0], dict))),
    ],
)
def test_the_input_is_found_where_it_is_unambiguous(wrt, batch, labels):
    found = found_in(batch, wrt=wrt)
    assert torch.equal(found.inputs, X[:2])
    assert (None if found.labels is None else found.labels.tolist()) == labels


def test_several_inputs_by_name_or_place():
    found = found_in([[X, X + 1], Y], wrt=1)
    assert torch.equal(found.inputs[1], X[:2] + 1)
    assert found.labels.tolist() == [0, 1]
    named = found_in(Images(X, MASK, Y), wrt="image")
    assert list(named.inputs) == ["image", "mask"]
    assert named.labels.tolist() == [0, 1]


# A batch, and what helps: an expression that gives this input and these labels of it.
AMBIGUOUS = [
    ([[X, X + 1], Y], "(batch[0][0], batch[1])", "wrt=0"),
    ({"view1": X, "view2": X, "target": Y}, '(batch["view1"], batch["target"])', 'wrt="view1"'),
    (({"a": X, "b": X + 1}, Y), '(batch[0]["a"], batch[1])', 'wrt="a"'),
    ({"inputs": {"image": X}, "targets": {"cls": Y}}, '(batch["inputs"]["image"], batch["targets"]["cls"])', ""),
    ((Y, X), "(batch[1], batch[0])", ""),
    ({"image": (X * 255).byte(), "label": Y}, '(batch["image"].float() / 255, batch["label"])', ""),
    ([{"image": x, "label": int(y)} for x, y in zip(X, Y, strict=True)],
     '(torch.stack([sample["image"] for sample in batch]), torch.tensor([int(sample["label"]) for sample in batch]))',
     "It is a list of samples"),
    (list(zip(X, Y.tolist(), strict=True)), "torch.utils.data.default_collate(batch)", "It is a list of samples"),
    ((list(X), [{"boxes": X}] * 10), "torch.stack(list(batch[0]))", "module(list(x))"),
    ((tuple(X), ({"boxes": X},) * 10), "torch.stack(list(batch[0]))", "output_fn"),
    (([X[0]], [{"boxes": X}]), "torch.stack(list(batch[0]))", ""),
    ({"input_ids": TOKENS, "attention_mask": MASK, "labels": Y},
     '({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}, batch["labels"])',
     "wrt='embedding'"),
    ({"input_ids": TOKENS, "attention_mask": MASK.float()},
     '{"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}', "Tokens have no derivative"),
    ({"input_ids": TOKENS, "labels": Y}, '(batch["input_ids"], batch["labels"])', "wrt='embedding'"),
    ({"input_ids": TOKENS, "labels": TOKENS}, 'batch["input_ids"]', "wrt='embedding'"),
    ([{"image": x, "label": "cat"} for x in X], 'torch.stack([sample["image"] for sample in batch])', "samples"),
    ([{"image": x, "target": {"boxes": x}} for x in X], 'torch.stack([sample["image"] for sample in batch])', ""),
    ([{"image": x.numpy(), "label": y.numpy()} for x, y in zip(X, Y, strict=True)],
     '(torch.stack([torch.from_numpy(sample["image"]) for sample in batch]), '
     'torch.tensor([int(sample["label"]) for sample in batch]))', "It is a list of samples"),
    ([Sample(x, int(y)) for x, y in zip(X, Y, strict=True)],
     '(torch.stack([sample.image for sample in batch]), torch.tensor([int(sample.label) for sample in batch]))', ""),
    ([[x, int(y)] for x, y in zip(X, Y, strict=True)], "torch.utils.data.default_collate(batch)", "list of samples"),
    (list(X), "torch.stack(list(batch))", "If these are samples"),
    ((X, X + 1, X + 2), "batch[0]", "if each is a batch"),
    ((tuple(X), tuple(Y)),
     "(torch.stack(list(batch[0])), torch.tensor([int(label) for label in batch[1]]))", "module(list(x))"),
    ((torch.rand(10), Y), "(batch[0].unsqueeze(1), batch[1])", "forward_fn=lambda module, x: module(x.squeeze(1))"),
    ({"inputs": {"image": X, "meta": X[:, 0]}, "target": Y},
     '(batch["inputs"]["image"], batch["target"])', 'wrt="image"'),
]  # fmt: skip


@pytest.mark.parametrize(("batch", "expression", "words"), AMBIGUOUS)
def test_the_message_shows_what_helps_and_it_does(batch, expression, words):
    with pytest.raises(ConfigurationError) as error:
        found_in(batch)
    message = str(error.value)
    assert structure(batch) in message
    assert f"input_fn=lambda batch: {expression}" in message
    assert words in message
    wrt = "embedding" if "wrt='embedding'" in message or "Tokens" in message else None
    given = eval(f"lambda batch: {expression}", {"torch": torch})  # a user pastes it
    found = found_in(batch, input_fn=given, wrt=wrt)
    x, labels = (given(batch), None) if not isinstance(given(batch), (tuple, list)) else given(batch)
    torch.testing.assert_close(found.inputs["input_ids"] if isinstance(x, dict) else found.inputs,
                               (x["input_ids"] if isinstance(x, dict) else x)[:2])  # fmt: skip
    assert (found.labels is None) == (labels is None)


@pytest.mark.parametrize(
    ("batch", "wrt", "shapes"),
    [
        ([[X, X + 1], Y], 0, "([10, 3, 4, 4], [10, 3, 4, 4])"),
        (
            {"inputs": {"image": X, "meta": X[:, 0], "label": Y}},
            "image",
            "{'image': [10, 3, 4, 4], 'meta': [10, 4, 4]}",
        ),
        ({"inputs": [MASK, X, X]}, 1, "([10, 8], [10, 3, 4, 4], [10, 3, 4, 4])"),
        ((None, X, X), 0, "([10, 3, 4, 4], [10, 3, 4, 4])"),
    ],
)
def test_the_message_shows_how_to_give_all_inputs_and_it_works(batch, wrt, shapes):
    with pytest.raises(ConfigurationError, match="if the model takes all of them, input_fn=lambda") as error:
        found_in(batch)
    (expression, named) = re.search(
        r"of them, input_fn=lambda batch: (.*) and the .*wrt=(.*)\.$", str(error.value)
    ).groups()
    assert eval(named) == wrt
    samples = SampleSource(input_fn=eval(f"lambda batch: {expression}"), num_samples=10, wrt=wrt).select_from_batch(
        batch
    )
    assert samples.shapes == shapes


FORECAST = {  # as pytorch-forecasting's: lengths are no labels, and the model takes all of it
    "encoder_cont": torch.rand(10, 8, 2),
    "encoder_lengths": torch.full((10,), 8),
    "decoder_cont": torch.rand(10, 4, 2),
    "groups": torch.zeros(10, 1, dtype=torch.long),
}


def test_a_batch_by_name_needs_no_more_than_the_name():
    with pytest.raises(ConfigurationError) as error:
        found_in((FORECAST, (torch.rand(10, 4), None)))
    assert str(error.value).endswith(
        'Give input_fn=lambda batch: batch[0]["encoder_cont"]; or, if the model takes all of them, only name the one '
        'to differentiate, wrt="encoder_cont".'
    )
    found = found_in((FORECAST, (torch.rand(10, 4), None)), wrt="encoder_cont")
    assert list(found.inputs) == list(FORECAST)
    assert found.labels is None


def test_numbers_that_are_not_the_labels_are_inputs_too():
    batch = {"inside": {**FORECAST, "fine": Y, "coarse": Y // 2}}
    with pytest.raises(ConfigurationError) as error:
        found_in(batch)
    expression = re.search(r"of them, input_fn=lambda batch: (.*) and the", str(error.value))[1]
    given = SampleSource(input_fn=eval(f"lambda batch: {expression}"), wrt="encoder_cont").select_from_batch(batch)
    assert list(given.inputs) == [*FORECAST, "coarse"]
    assert given.labels.tolist() == list(range(8))


@pytest.mark.parametrize(
    "batch",
    [(X, Y.unsqueeze(1)), {"image": X, "target": Y.unsqueeze(1)}, ({"image": X}, Y.unsqueeze(1))],
)
def test_labels_in_a_column(batch):
    assert found_in(batch).labels.tolist() == [0, 1]


MOLECULES = {  # as SchNetPack's: four atoms in each of three molecules
    "_n_atoms": torch.full((3,), 4),
    "_atomic_numbers": torch.tensor([8, 1, 1, 6] * 3),
    "_positions": torch.rand(12, 3),
    "_idx_m": torch.arange(3).repeat_interleave(4),
    "energy": torch.rand(3),
    "forces": torch.rand(12, 3),
}


@pytest.mark.parametrize("wrt", [None, "_positions"])
def test_rows_that_are_atoms_of_several_molecules_are_no_samples(wrt):
    with pytest.raises(ConfigurationError, match=r'"_idx_m".* says to which graph or molecule each belongs') as error:
        found_in(MOLECULES, wrt=wrt)
    expression = re.search("for example samples=(.*) of a batch", str(error.value))[1]
    assert torch.equal(eval(expression, {"batch": MOLECULES}), MOLECULES["_positions"][:4].unsqueeze(0))


def test_atoms_with_edges_are_explained_in_the_batchs_own_names():
    """As NequIP's batches."""
    edges = torch.zeros(2, 24, dtype=torch.long)
    batch = {"edge_index": edges, "batch": MOLECULES["_idx_m"], "pos": torch.rand(12, 3), "energy": torch.rand(3, 1)}
    with pytest.raises(ConfigurationError, match=r'example samples=batch\["pos"\]\[batch\["batch"\] == 0\]'):
        found_in(batch)


def test_sorted_labels_are_no_numbers_of_molecules():
    batch = {"image": X, "scale": torch.rand(4), "label": torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3])}
    assert found_in(batch).labels.tolist() == [0, 0]


@pytest.mark.parametrize("pack", [lambda p: p, lambda p: (p, Y[:3]), lambda p: {"words": p, "label": Y[:3]}])
def test_the_message_shows_how_to_measure_packed_sequences_and_it_works(pack):
    lstm = torch.nn.LSTM(2, 4, batch_first=True)
    packed = pack_padded_sequence(torch.rand(3, 4, 2), torch.tensor([2, 4, 3]), batch_first=True, enforce_sorted=False)
    batch = pack(packed)
    with pytest.raises(ConfigurationError, match="Packed sequences have no rows") as error:
        found_in(batch)
    found = re.search("pad them, input_fn=(.*), with wrt=0.*, forward_fn=(.*)\\.$", str(error.value))
    input_fn, forward_fn = (eval(source, {"torch": torch}) for source in found.groups())
    samples = SampleSource(input_fn=input_fn, num_samples=3, wrt=0).select_from_batch(batch)
    assert (samples.labels is None) == (batch is packed)
    expected = torch.nn.utils.rnn.pad_packed_sequence(lstm(packed)[0], batch_first=True)[0]
    given = torch.nn.utils.rnn.pad_packed_sequence(forward_fn(lstm, samples.inputs)[0], batch_first=True)[0]
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.eye(4).to_sparse(), r"sparse \(torch.sparse_coo\).*x.to_dense\(\)"),
        (lambda: torch.eye(4).to_sparse_csr(), r"sparse \(torch.sparse_csr\)"),
        (lambda: torch.nested.nested_tensor([torch.rand(3, 2), torch.rand(2, 2)]), "nested tensor"),
        (lambda: torch.nested.nested_tensor([torch.rand(3, 2)] * 4, layout=torch.jagged), "nested tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(Sparse|prototype)")
def test_tensors_without_rows_of_one_shape(make, reason):
    with pytest.raises(ConfigurationError, match=reason):
        found_in((make(), Y[:4]))


@pytest.mark.parametrize("batch", [GRAPHS, (GRAPHS, Y[:4])])
def test_graphs_are_neither_samples_nor_datasets(batch):
    with pytest.raises(ConfigurationError, match=r"'edge_index': int64 \[2, 80\].*A graph is one sample.*forward_fn="):
        found_in(batch)


@pytest.mark.parametrize(
    "batch", [[1, 2, 3], "text", ([0.1], [1]), ["a", "b"], None, 3, [], {}, {"x": X.numpy()}, [[]], [None]]
)
def test_nothing_to_differentiate(batch):
    with pytest.raises(ConfigurationError, match=r"not found in the batch: .*Give input_fn, which takes a batch"):
        found_in(batch)


def test_labels_of_another_number_say_that_rows_are_no_samples():
    with pytest.raises(ConfigurationError, match="not found in the batch"):
        found_in({"nodes": X, "label": Y[:3]})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (X, "float32 [10, 3, 4, 4]"),
        ({"a": [Y, None], 3: "text"}, "dict {'a': list [int64 [10], None], 3: str}"),
        ([Y] * 5, "list of 5 times int64 [10]"),
        (Short(X, np.zeros(2)), "Short {'picture': float32 [10, 3, 4, 4], 'digit': NumPy float64 [2]}"),
        ([[[[[Y]]]]], "list [list [list [list [list]]]]"),
    ],
)
def test_structure(value, text):
    assert structure(value) == text


def test_a_long_structure_is_cut():
    assert re.fullmatch(r"dict \{('\d+': int, ){12}and 88 more\}", structure({str(n): n for n in range(100)}))


def test_a_dataset_whose_samples_make_no_batch():
    with pytest.raises(
        ConfigurationError, match=r"such as tuple \[float32 \[1, 3\], int\], cannot be put into a batch"
    ):
        SampleSource(num_samples=3).select(Ragged())


class Ragged(torch.utils.data.Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return torch.rand(i + 1, 3), i
