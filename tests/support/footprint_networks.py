"""Networks, from [N, 1, 8, 8] to [N, 10], of many kinds, some of which write wherever a forward can."""

import random
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from support.networks import custom_function

STREAM = np.random.default_rng(7)  # a module's own, as transforms often have


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


sine_once = custom_function(torch.sin, torch.cos, once=True)


class Unmeasurable(nn.Module):
    """Whose Hessian cannot be had, for the reason named."""

    def __init__(self, reason):
        super().__init__()
        self.net, self.reason = mlp(), reason

    def forward(self, x):
        if self.reason == "random":
            x = F.dropout(x, 0.5, training=True)
        if self.reason == "once":
            x = sine_once(x)
        if self.reason == "detached":
            x = x**3 * x.mean((1, 2, 3), keepdim=True).mul(20).exp().detach()
        if self.reason == "coupled":
            x = x - x.mean(0)
        if self.reason == "raises" and not self.training:
            raise RuntimeError("only for training")
        return self.net(x)
