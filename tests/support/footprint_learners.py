"""Lightning modules, data and callbacks that write or draw somewhere of their own."""

import random

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_hessian.model.torch_settings import PRECISION_SWITCHES, precision_switch
from support import training
from support.footprint_networks import STREAM, cnn, mlp
from support.training import digits


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


class Augmented(training.Augmented):
    """Draws from all three global streams, as image transforms do."""

    def __getitem__(self, i: int):
        x, y = super().__getitem__(i)
        return x + 0.01 * (np.random.rand() + random.random()), y  # noqa: NPY002


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
