"""Batches that are dicts and models with several inputs, in real training runs."""

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.training import Classifier, digits, fit, small_monitor, trainer_of, whole_hessians
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import ConfigurationError, input_hessian, load_records
from lightning_hessian.curvature.options import Options
from lightning_hessian.errors import MeasurementError
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.settings import MeasurementSettings

X, Y = digits(0, 48).tensors
TOKENS = (X[:, 0, :, 2] * 9).long()  # eight grey values of a digit's column
MASK = (torch.arange(8) < 4 + Y[:, None] % 4).long()


class Transformers(Classifier):
    """The manners of transformers: batches are dicts, the forward takes names, the output holds logits."""

    def training_step(self, batch, batch_idx):
        self.flags.append(batch_idx)
        names = {name: value for name, value in batch.items() if name != "labels"}
        return nn.functional.cross_entropy(self(**names).logits, batch["labels"])

    def validation_step(self, batch, batch_idx):
        pass


class Images(Transformers):
    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.net(pixel_values))


class Text(Transformers):
    """A recurrent network of tokens in which masked ones do not count."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.net = nn.Embedding(10, 3), nn.GRU(3, 5, batch_first=True), nn.Linear(5, 10)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        embedded = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        states = self.body(embedded)[0] * attention_mask.unsqueeze(-1)
        return SimpleNamespace(logits=self.net(states.sum(1)))


class Pair(Transformers):
    """An image whose rows are weighted by another input."""

    def forward(self, image, weights):
        return SimpleNamespace(logits=self.net(image * weights[:, None, :, None]))


def rows(**columns):
    """A dataset of dicts."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def records_of(folder, model, dataset, **arguments):
    monitor = small_monitor(classes="label", **arguments)
    fit(folder, monitor, model=model, train=dataset, held_out=dataset[:16], max_epochs=1)
    records = load_records(folder)
    assert [r.step for r in records] == [0, 3]
    assert all(np.array_equal(r.labels, Y[:2]) for r in records)
    return records


def expected(model, inputs, wrt):
    """The whole Hessian at the first sample, by the function that needs no Trainer."""
    return input_hessian(model, inputs, Y[:1], wrt=wrt)[0].numpy()


def test_the_image_of_a_dict_is_found(tmp_path):
    model = Images()
    *_, record = records_of(tmp_path, model, rows(pixel_values=X, labels=Y))
    assert np.array_equal(record.x, X[:2])
    np.testing.assert_allclose(whole_hessians(record, 1)[0], expected(model, X[:1], None), rtol=0, atol=1e-6)


WEIGHTS = torch.linspace(0.5, 1.5, 8).repeat(48, 1)


@pytest.mark.parametrize("wrt", ["image", "weights"])
def test_one_of_several_inputs_is_named(tmp_path, wrt):
    model = Pair()
    *_, record = records_of(tmp_path, model, rows(image=X, weights=WEIGHTS, labels=Y), wrt=wrt)
    inputs = {"image": X[:1], "weights": WEIGHTS[:1]}
    assert np.array_equal(record.x[:1], inputs[wrt])
    np.testing.assert_allclose(whole_hessians(record, 1)[0], expected(model, inputs, wrt), rtol=0, atol=1e-6)


def test_inputs_by_position(tmp_path):
    def input_fn(batch):
        return (batch["image"], batch["weights"]), batch["labels"]

    model = Pair()
    *_, record = records_of(tmp_path, model, rows(image=X, weights=WEIGHTS, labels=Y), wrt=1, input_fn=input_fn)
    assert np.array_equal(record.x, WEIGHTS[:2])
    by_name = {"image": X[:1], "weights": WEIGHTS[:1]}
    np.testing.assert_allclose(whole_hessians(record, 1)[0], expected(model, by_name, "weights"), rtol=0, atol=1e-6)


def test_tokens_with_a_mask_are_measured_at_their_embeddings(tmp_path):
    def input_fn(batch):
        return {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"]

    model = Text()
    dataset = rows(input_ids=TOKENS, attention_mask=MASK, labels=Y)
    *_, record = records_of(tmp_path, model, dataset, wrt="embedding", input_fn=input_fn)
    embedded = model.embedding(TOKENS[:2]).detach()
    np.testing.assert_allclose(record.x, embedded, rtol=1e-6)
    inputs = {"inputs_embeds": embedded[:1], "attention_mask": MASK[:1]}
    np.testing.assert_allclose(
        whole_hessians(record, 1)[0], expected(model, inputs, "inputs_embeds"), rtol=0, atol=1e-6
    )
    masked = record.gradient[:, 0].reshape(2, 8, 3)[MASK[:2] == 0]
    assert len(masked)
    assert not masked.any()  # the mask was given to the model


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {},
            r"dict \{'input_ids': int64 \[16, 8\], 'attention_mask': int64 \[16, 8\], 'labels': int64 \[16\]\}. .*"
            r"wrt='embedding', and give input_fn=lambda batch: .*",
        ),
        (
            {"wrt": "embedding"},
            r"Give input_fn=lambda batch: \(\{\"input_ids\": batch\[\"input_ids\"\], \"attention_mask\": "
            r"batch\[\"attention_mask\"\]\}, batch\[\"labels\"\]\)\.",
        ),
        ({"wrt": "input_ids"}, "torch.int64, and a derivative needs floating point"),
        ({"input_fn": dict}, "several inputs .*'attention_mask', 'labels'.*name .* with wrt"),
        ({"input_fn": lambda b: {"a": b["labels"], "b": "text"}}, r"keys|from input_fn"),
    ],
)
@pytest.mark.parametrize("sanity", [0, 2])
def test_what_cannot_be_guessed_raises_before_training(tmp_path, arguments, sentence, sanity):
    model, dataset = Text(), rows(input_ids=TOKENS, attention_mask=MASK, labels=Y)
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(
            tmp_path,
            small_monitor(**arguments),
            model=model,
            train=dataset,
            held_out=dataset,
            num_sanity_val_steps=sanity,
        )
    assert model.flags == []


def test_samples_are_checked_at_once():
    settings = MeasurementSettings(3, "logit", "float32", Options())
    with pytest.raises(ConfigurationError, match=r"several inputs .*'image', 'weights'.*name .* with wrt"):
        settings.check_samples(Samples({"image": X, "weights": WEIGHTS}, None))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_given_samples_of_several_inputs(tmp_path):
    model = Pair()
    samples = {"image": X, "weights": WEIGHTS, "labels": Y}
    monitor = small_monitor(classes="label", samples=samples, wrt="image", sample_indices=[7])
    fit(tmp_path, monitor, model=model, train=rows(**samples), held_out=False, max_epochs=1)
    assert all(np.array_equal(r.x, X[[7]]) for r in load_records(tmp_path))
    as_dataset = small_monitor(classes="label", samples=rows(**samples)[5:], wrt="image")
    assert isinstance(DataLoader(rows(**samples)).dataset, list)
    with pytest.raises(MisconfigurationException, match="input_fn"):  # a list is a batch, not a dataset
        fit(tmp_path / "list", as_dataset, model=model, train=rows(**samples), held_out=False)


# What a loader's own collate_fn makes of samples


@dataclass
class Batch:
    image: torch.Tensor
    mask: torch.Tensor
    label: torch.Tensor


class Fields(NamedTuple):
    image: torch.Tensor
    mask: torch.Tensor
    label: torch.Tensor


class Own(Classifier):
    """Takes the image and the label of a batch by attribute, and counts in the hook that moves it."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.moved = getattr(self, "moved", 0) + 1
        return batch

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch.image), batch.label)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch.label))


def fit_on(folder, monitor, model, collate, sanity=2, dataset=None):
    torch.manual_seed(1)
    dataset = [(X[n], MASK[n], Y[n]) for n in range(48)] if dataset is None else dataset
    loaders = [DataLoader(dataset[:size], batch_size=16, collate_fn=collate) for size in (48, 16)]
    callbacks = [] if monitor is None else [monitor]
    trainer_of(folder, *callbacks, max_epochs=1, num_sanity_val_steps=sanity).fit(model, *loaders)
    return model


@pytest.mark.parametrize("kind", [Batch, Fields])
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.filterwarnings("ignore:.*No measurement before training:UserWarning")  # its hook must not run once more
def test_a_batch_that_is_an_object(tmp_path, kind, sanity):
    def collate(samples):
        return kind(*map(torch.stack, zip(*samples, strict=True)))

    models = [Own(), Own()]
    models[1].load_state_dict(models[0].state_dict())
    model = fit_on(tmp_path, small_monitor(classes="label"), models[0], collate, sanity)
    records = load_records(tmp_path)
    assert [r.step for r in records] == ([0, 3] if sanity else [3])
    assert all(np.array_equal(r.x, X[:2]) and np.array_equal(r.labels, Y[:2]) for r in records)
    alone = fit_on(tmp_path / "alone", None, models[1], collate, sanity)
    assert alone.moved == model.moved
    assert all(map(torch.equal, alone.state_dict().values(), model.state_dict().values()))


class Segmenting(Transformers):
    def forward(self, image):
        return self.net(image)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["image"]), batch["mask"].flatten(1).sum(1) % 10)


def test_an_image_beside_its_mask(tmp_path):
    dataset = rows(image=X, mask=(X[:, 0] > 0.5).long())
    fit(tmp_path, small_monitor(), model=Segmenting(), train=dataset, held_out=dataset[:16], max_epochs=1)
    assert all(np.array_equal(r.x, X[:2]) for r in load_records(tmp_path))


class Graphs:
    """Has the manners of PyTorch Geometric's ``Batch``: a length, items, and no rows."""

    def __init__(self, nodes, edges):
        self.stored = {"x": nodes, "edge_index": edges, "y": torch.zeros(4, dtype=torch.long)}
        self.image, self.label = X[:16], Y[:16]

    def keys(self):
        return [*self.stored]

    def __len__(self):
        return 4

    def __getitem__(self, key):
        return self.stored[key]


def test_a_batch_of_graphs_is_no_dataset(tmp_path):
    def collate(samples):
        return Graphs(torch.rand(12, 3), torch.zeros(2, 9, dtype=torch.long))

    with pytest.raises(MisconfigurationException, match=r"Graphs \{'x': float32 \[12, 3\], .*A graph is one sample"):
        fit_on(tmp_path, small_monitor(), Own(), collate, 2)


class Views(Classifier):
    def training_step(self, batch, batch_idx):
        (first, second), _ = batch
        return (self(first) - self(second)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_two_views(tmp_path):
    def views(folder, **arguments):
        dataset = [([X[n], X[n].flip(-1)], Y[n]) for n in range(48)]
        return fit_on(folder, small_monitor(classes="label", **arguments), Views(), None, dataset=dataset)

    with pytest.raises(MisconfigurationException, match=r"input_fn=lambda batch: \(batch\[0\]\[0\], batch\[1\]\); or"):
        views(tmp_path / "ambiguous")
    views(tmp_path, input_fn=lambda batch: (batch[0][0], batch[1]))
    assert all(np.array_equal(r.labels, Y[:2]) and np.array_equal(r.x, X[:2]) for r in load_records(tmp_path))


# Models of one output


class Binary(Classifier):
    def forward(self, x):
        return self.net(x)[:, :1]

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.binary_cross_entropy_with_logits(self(x)[:, 0], (y > 4).float())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_the_label_of_a_single_output(tmp_path):
    model = Binary()
    with pytest.raises(
        MisconfigurationException, match=r"labels from \d to \d, and the model has a single.*classes=0\."
    ):
        fit(tmp_path, small_monitor(classes="label", num_samples=8, target="logit"), model=model)
    fit(tmp_path, small_monitor(classes=0, target="logit"), model=model, max_epochs=1)
    assert load_records(tmp_path)[-1].class_ids == (0,)


class Few(Classifier):
    def forward(self, x):
        return self.net(x)[:, :3]

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y % 3)

    validation_step = training_step


def test_labels_that_are_no_classes(tmp_path):
    with pytest.raises(
        MisconfigurationException, match=r"labels from \d to \d, and the model has 3 outputs .*from 0 to 2"
    ):
        fit(tmp_path, small_monitor(classes="label", num_samples=8, target="logit"), model=Few())


class Sorted(LightningModule):
    """An LSTM over packed sequences, from the longest to the shortest."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 10)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True)
        return self.head(self.body(packed)[1][0][-1])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["x"], batch["lengths"]), batch["label"])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_sequences_sorted_by_length(tmp_path, method):
    lengths = torch.arange(8, 4, -1).repeat_interleave(12)
    dataset = [{"x": X[n, 0], "lengths": lengths[n], "label": Y[n]} for n in range(48)]
    monitor = small_monitor(classes="label", wrt="x", method=method, num_samples=16, num_eigenvalues=4)
    model = fit_on(tmp_path, monitor, Sorted(), None, dataset=dataset)
    record = load_records(tmp_path)[-1]
    assert record.step == 3
    inputs = {"x": X[:16, 0], "lengths": lengths[:16]}
    largest = torch.linalg.eigvalsh(input_hessian(model, inputs, Y[:16], wrt="x"))[:, 0, -1]
    np.testing.assert_allclose(record.eigenvalues.max(-1)[:, 0], largest, rtol=1e-3, atol=1e-6)


class WithoutForward(Classifier):
    """Its steps call what it holds."""

    forward = LightningModule.forward

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass


def test_a_module_without_a_forward(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"WithoutForward has no forward method.*module.net\(x\)\.$"):
        fit(tmp_path, small_monitor(on_error="warn"), model=WithoutForward())
    fit(tmp_path, small_monitor(forward_fn=lambda module, x: module.net(x)), model=WithoutForward(), max_epochs=1)
    assert len(load_records(tmp_path)) == 2


def test_images_of_integers(tmp_path):
    dataset = TensorDataset((X * 255).byte(), Y)
    with pytest.raises(MisconfigurationException, match=r"x.float\(\) / 255, or x.float\(\) if the model scales them"):
        fit(tmp_path, small_monitor(), train=dataset, held_out=dataset)


class Encoded(Images):
    """Takes two inputs, as an encoder and a decoder do, or all of a batch in one dict."""

    def forward(self, encoder, decoder, *, scale=1.0):
        return super().forward(encoder + decoder) * scale


class OfDict(Images):
    def forward(self, batch):
        return super().forward(batch["image"] * batch["weights"][:, None, :, None])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch).logits, batch["labels"])


def test_a_forward_that_takes_other_inputs_raises_before_training(tmp_path):
    train, monitor = rows(image=X, labels=Y), small_monitor(classes="label")
    takes = r"Encoded.forward takes \(encoder, decoder, \*, scale=1.0\), and is called with 1 input. "
    with pytest.raises(MisconfigurationException, match=takes + r'.*returns \(\{"encoder": ..., "decoder": ...\}, lab'):
        fit(tmp_path, monitor, model=Encoded(), train=train, held_out=train)


def test_a_forward_that_takes_a_dict_is_explained_and_then_measured(tmp_path):
    train = rows(image=X, weights=WEIGHTS, labels=Y)
    with pytest.raises(
        MisconfigurationException, match=r"OfDict.forward takes \(batch\), .* 2 inputs by name"
    ) as error:
        fit(tmp_path, small_monitor(classes="label", wrt="image"), model=OfDict(), train=train, held_out=train)
    forward_fn = eval(re.search("give forward_fn=(.*); otherwise", str(error.value))[1])
    model = OfDict()
    *_, record = records_of(tmp_path, model, train, wrt="image", forward_fn=forward_fn)
    inputs = {"image": X[:1], "weights": WEIGHTS[:1]}
    found = input_hessian(model, inputs, Y[:1], wrt="image", forward_fn=forward_fn)[0].numpy()
    np.testing.assert_allclose(whole_hessians(record, 1)[0], found, rtol=0, atol=1e-6)


class Indexed(Images):
    """Takes something else than a tensor, as forwards of forecasting libraries do."""

    def forward(self, batch):
        return super().forward(batch["image"])


def test_a_forward_that_fails_is_shown_where_it_does(tmp_path):
    failure = r"IndexError: .*The samples have the shape.* at 'return super\(\).forward\(batch\[\"image\"\]\)' in line"
    with pytest.raises(MeasurementError, match=failure):
        fit(tmp_path, small_monitor(), model=Indexed(), train=rows(image=X, labels=Y), held_out=rows(image=X, labels=Y))
