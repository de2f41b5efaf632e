"""Small training runs of many kinds, and all that such a run leaves behind."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import keystr, tree_flatten_with_path
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_hessian.model.torch_settings import PRECISION_SWITCHES, precision_switch
from support.training import digits, trainer_of

# Networks, from [N, 1, 8, 8] to [N, 10]


def mlp(wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), wrap(nn.Linear(64, 12)), nn.GELU(), nn.Linear(12, 10))


def cnn(activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    first = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), activation(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*first, nn.BatchNorm1d(36), nn.Dropout(0.3), nn.Linear(36, 10))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(2), nn.SiLU(), nn.Conv2d(2, 2, 3, padding=1)) for _ in range(2)
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        x = x.repeat(1, 2, 1, 1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.flatten(1))


class Recurrent(nn.Module):
    def __init__(self, kind, **arguments):
        super().__init__()
        self.cells = kind(8, 6, batch_first=True, **arguments)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        return self.head(self.cells(x.squeeze(1))[0][:, -1])


class Attention(nn.Module):
    """Rows as tokens, the last two of them padding: in eval mode without gradients torch takes another path."""

    def __init__(self, padded=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.1, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 10)
        self.padded = padded

    def forward(self, x):
        mask = (torch.arange(8, device=x.device) >= 6).expand(len(x), -1) if self.padded else None
        return self.head(self.encoder(x.squeeze(1), src_key_padding_mask=mask).mean(1))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.head, self.reentrant = cnn()[:-1], nn.Linear(36, 10), reentrant

    def forward(self, x):
        x = x.clone().requires_grad_() if self.reentrant and not x.requires_grad else x  # its own condition
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


class Note:
    """A hook that is an object, and counts."""

    def __init__(self):
        self.calls, self.shapes = 0, []

    def __call__(self, module, inputs, output):
        self.calls += 1
        self.shapes.append(output.shape[1])


class Careless(nn.Module):
    """Writes wherever a forward and its hooks can, and lets what it wrote act on the output."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("mean", torch.zeros(64))
        self.plain, self.array, self.count = torch.zeros(64), np.zeros(3), 0
        self.history, self.recent, self.nested = [], deque(maxlen=3), {"sums": {"all": []}}
        self.streams = [torch.Generator().manual_seed(3), np.random.default_rng(3), random.Random(3)]
        self.note = Note()
        self.hidden = [cnn()]  # not registered, as a teacher often is
        self.net.register_forward_hook(self.note)
        self.net.register_forward_hook(self.add)
        self.net.register_forward_hook(Note().__call__)  # a method of something that only the hook holds
        self.net.register_forward_pre_hook(counting_hook(self.history))

    def add(self, module, inputs, output):
        self.added = getattr(self, "added", 0) + 1

    def forward(self, x):
        self.count += 1
        self.plain += x.detach().mean(0).flatten()
        self.array += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0).flatten()
        self.recent.append(len(x))
        self.nested["sums"]["all"].append(self.count)
        self.last = x
        drawn = [torch.rand((), generator=self.streams[0]), self.streams[1].random(), self.streams[2].random()]
        if self.training:
            x = x + 0.01 * (sum(drawn) + self.count + self.plain.mean() + self.net_calls())
        return self.net(x) + self.hidden[0](x)

    def net_calls(self):
        return self.note.calls + self.added if hasattr(self, "added") else 0


def counting_hook(history):
    calls = 0

    def hook(module, inputs):
        nonlocal calls
        calls += 1
        history.append(calls)

    return hook


class Globals(nn.Module):
    """Draws from a stream of its file, and counts on its class."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        type(self).calls += 1
        noise = self.noise()
        return self.net(x + 0.01 * (noise + self.calls % 3) if self.training else x)

    def noise(self):
        return STREAM.random()


class OwnAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.net(x)
        return h.float()


class Once(torch.autograd.Function):
    """A sine that can be differentiated only once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Unmeasurable(nn.Module):
    """Whose Hessian cannot be had, for the reason named."""

    def __init__(self, reason):
        super().__init__()
        self.net, self.reason = mlp(), reason

    def forward(self, x):
        if self.reason == "random":
            x = F.dropout(x, 0.5, training=True)
        if self.reason == "once":
            x = Once.apply(x)
        if self.reason == "detached":
            x = x**3 * x.mean((1, 2, 3), keepdim=True).mul(20).exp().detach()
        if self.reason == "coupled":
            x = x - x.mean(0)
        if self.reason == "raises" and not self.training:
            raise RuntimeError("only for training")
        return self.net(x)


# Lightning modules


class Learner(LightningModule):
    """Trains a network, and writes down what every step finds."""

    def __init__(self, net, optimizer=torch.optim.Adam, scheduler=None, frozen=False):
        super().__init__()
        self.net, self.optimizer, self.scheduler, self.frozen = net, optimizer, scheduler, frozen
        self.journal = []

    def forward(self, x):
        return self.net(x.to(self.dtype))

    def on_train_batch_start(self, batch, batch_idx):
        if self.frozen:
            self.net[1].eval()
            self.net[0].bias.requires_grad_(False)
        grads = [None if p.grad is None else float(p.grad.double().sum()) for p in self.parameters()]
        flags = [m.training for m in self.modules()], [p.requires_grad for p in self.parameters()]
        metrics = {k: v for k, v in self.trainer.callback_metrics.items() if not k.startswith("hessian_")}
        seen = {"settings": settings(), "metrics": metrics, "batch": batch[0].double().sum()}
        self.journal.append({"grads": grads, "flags": flags, **seen})

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=0.01)
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])


class TwoOptimizers(Learner):
    def __init__(self):
        super().__init__(mlp())
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[1].parameters(), lr=0.1), torch.optim.Adam(self.net[3].parameters())]


class Averaged(Learner):
    """Keeps an exponential average of its network, as a part of itself."""

    def __init__(self):
        super().__init__(cnn())
        self.average = AveragedModel(self.net, use_buffers=True)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.average.update_parameters(self.net)


class Logs(Learner):
    """Logs in its forward."""

    def forward(self, x):
        self.log_dict({"outer": x.mean(), "other": x.std()})
        return super().forward(x)


class Quiet(Learner):
    """Logs nothing: Dynamo cannot trace through Lightning's ``log``."""

    def log(self, *arguments, **more):
        pass


class Unpacks(Quiet):
    """Its batches are objects."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start((batch.x, batch.y), batch_idx)

    def training_step(self, batch, batch_idx):
        return super().training_step((batch.x, batch.y), batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step((batch.x, batch.y), batch_idx)


class Transfers(Learner):
    """Counts and augments where batches go to the device."""

    def __init__(self):
        super().__init__(mlp())
        self.moved, self.noise = 0, torch.Generator().manual_seed(5)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.moved += 1
        return batch[0] + 0.01 * self.moved * torch.rand(batch[0].shape, generator=self.noise), batch[1]


class Collates(LightningDataModule):
    """Augments where batches are put together, by streams of its own."""

    def __init__(self):
        super().__init__()
        self.moved, self.noise, self.numbers = 0, torch.Generator().manual_seed(5), iter(range(1000))

    def setup(self, stage):
        self.train, self.held_out = Augmented(digits(0, 24)), Augmented(digits(64, 72))

    def train_dataloader(self):
        return DataLoader(self.train, 8, shuffle=True, collate_fn=self.together)

    def val_dataloader(self):
        return DataLoader(self.held_out, 8, collate_fn=self.together)

    def together(self, samples):
        x, y = default_collate(samples)
        return x + 0.01 * torch.rand(x.shape, generator=self.noise) + 0.01 * STREAM.random(), y


class OwnStreams(Collates):
    """Counts and augments where batches go to the device, too."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.moved += 1
        return batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        noise = torch.rand(batch[0].shape, generator=self.noise)
        return batch[0] + 0.01 * (self.moved + next(self.numbers)) * noise, batch[1]


STREAM = np.random.default_rng(7)  # a module's own, as transforms often have


class Pack:
    """A batch that is an object."""

    def __init__(self, samples):
        self.x, self.y = default_collate(samples)

    def to(self, device, **options):
        return self


class FirstOf(Learner):
    """Validates on the first of several loaders."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        first = batch["first"] if isinstance(batch, dict) else batch
        if first is not None:  # max_size has used up the shorter loader
            super().validation_step(first, batch_idx)


class Counts(Callback):
    """Has a state that depends on what it sees."""

    def __init__(self):
        self.seen, self.stream = [], np.random.default_rng(9)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(batch[0].sum()) + self.stream.random())

    def state_dict(self):
        return {"seen": self.seen, "stream": self.stream.bit_generator.state}


class Augmented(Dataset):
    """Draws from all three global streams, as image transforms do."""

    def __init__(self, inner: Dataset) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, i: int):
        x, y = self.inner[i]
        return x + 0.05 * torch.randn_like(x) + 0.01 * (np.random.rand() + random.random()), y  # noqa: NPY002


class Drawing(Dataset):
    """Draws from a stream of its file."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return digits()[i][0] + 0.01 * STREAM.random(), 1


class DrawingLogger(Logger):
    """Draws from the global streams, as servers' clients do for names and delays."""

    name, version = "drawing", 0

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("hessian_") for name in metrics):
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002

    def log_hyperparams(self, params, *arguments, **more):
        pass


# Runs


@dataclass(frozen=True)
class Case:
    """A run: how its module is made, and what is special about its Trainer, loaders, callbacks and monitor."""

    make: Callable[[], nn.Module]
    trainer: dict = field(default_factory=dict)
    loader: dict = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list
    monitor: dict = field(default_factory=dict)
    data: Callable[[], LightningDataModule] | None = None
    several: str | None = None  # how CombinedLoader takes from two validation loaders


def run(case: Case, folder: Path, *callbacks: Callback) -> dict[str, object]:
    """Trains for two epochs of three batches with shuffling and augmentation; everything that is left behind."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    torch.compiler.reset()
    STREAM.bit_generator.state = np.random.default_rng(7).bit_generator.state
    model, others = case.make(), case.callbacks()
    loader = {"batch_size": 8, **case.loader}
    train = DataLoader(Augmented(digits(0, 24)), shuffle=True, **loader)
    held_out = DataLoader(Augmented(digits(64, 72)), **loader)
    if case.several is not None:
        other = DataLoader(Augmented(digits(72, 88)), **loader)
        held_out = CombinedLoader({"first": held_out, "other": [other]}, case.several)
    trainer = trainer_of(folder, *others, *callbacks, **case.trainer)
    if case.data is None:
        trainer.fit(model, train, held_out)
    else:
        trainer.fit(model, datamodule=case.data())
    return outcome(trainer, others)


def settings() -> dict[str, object]:
    """The global settings of torch that can be read."""
    backends = torch.backends
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return {
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), nesting),
        "autocast_cache": torch.is_autocast_cache_enabled(),
        "autocast_enter": torch.autocast.__enter__,
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "tf32": (backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32),
        "precision": {name: switch.fp32_precision for name in PRECISION_SWITCHES if (switch := precision_switch(name))},
        "attention": (backends.cuda.math_sdp_enabled(), backends.cuda.flash_sdp_enabled()),
        "fast_path": backends.mha.get_fastpath_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


def outcome(trainer: Trainer, callbacks: list[Callback]) -> dict[str, object]:
    """Weights, buffers, gradients, flags, plain attributes, optimizers, schedulers, metrics, random streams."""
    model = trainer.lightning_module
    careless = [m for m in model.modules() if isinstance(m, Careless)]
    left = {
        "model": dict(model.state_dict()),
        "grad": {name: p.grad for name, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "journal": model.journal,
        "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "scheduler": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "average": [c._average_model.state_dict() for c in callbacks if hasattr(c, "_average_model")],
        "plain": [plain_attributes(m) for m in careless] + [getattr(model, "moved", 0)],
        "data": [] if trainer.datamodule is None else [trainer.datamodule.moved, trainer.datamodule.noise.get_state()],
        "stream": STREAM.bit_generator.state,
        "callbacks": [c.state_dict() for c in callbacks if isinstance(c, Counts)],
        "hidden": [dict(m.hidden[0].state_dict()) for m in careless],
        "compiled": list(getattr(model, "compiled", ())),
        "torch": torch.get_rng_state(),
        "numpy": [*map(str, np.random.get_state()[2:]), np.random.get_state()[1].tolist()],  # noqa: NPY002
        "python": random.getstate(),
        "settings": settings(),
    }
    for kind in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        metrics = getattr(trainer, kind)
        left[f"metrics.{kind}"] = {k: v for k, v in metrics.items() if not k.startswith("hessian_")}
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(left)[0]}


def plain_attributes(model: Careless) -> list[object]:
    """What a careless forward has written."""
    streams = [model.streams[0].get_state(), model.streams[1].bit_generator.state, model.streams[2].getstate()]
    written = [model.plain, model.array.tolist(), model.count, model.history, list(model.recent), model.nested]
    holders = [getattr(hook, "__self__", None) for hook in model.net._forward_hooks.values()]
    notes = [vars(holder) for holder in [model.note, *holders] if isinstance(holder, Note)]
    return [*written, *streams, notes, model.added, model.last]


def differing(a: dict[str, object], b: dict[str, object]) -> list[str]:
    """The names of what is not the same to the last bit."""
    return sorted(a.keys() ^ b.keys()) + [k for k in a.keys() & b.keys() if not same(a[k], b[k])]


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b
