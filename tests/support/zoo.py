"""Models as people train them, tiny and with random weights, and the real data each of them takes."""

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: weights are random, configurations written here

import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset

from support.training import digits

PADDING = 0


# Data


def images(start: int, stop: int) -> TensorDataset:
    """Digits ``[N, 1, 8, 8]`` with their rounding undone by noise, so that none lies on a kink of max-pooling."""
    x, y = digits(start, stop).tensors
    return TensorDataset(x + torch.rand(x.shape, generator=torch.Generator().manual_seed(start)) / 16, y)


def rows(start: int, stop: int) -> TensorDataset:
    """The same digits as sequences of eight rows, ``[N, 8, 8]``."""
    x, y = images(start, stop).tensors
    return TensorDataset(x.squeeze(1), y)


class Texts(Dataset):
    """The inked pixels of a digit's two middle columns as tokens 1 to 16, padded; batches are dicts."""

    def __init__(self, start: int, stop: int) -> None:
        x, self.labels = digits(start, stop).tensors
        inked = [pixels[pixels > 0] for pixels in (x[:, 0, :, 3:5] * 16).long().flatten(1)]
        self.tokens = torch.stack([F.pad(ink, (0, 16 - len(ink)), value=PADDING) for ink in inked])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        mask = (self.tokens[i] != PADDING).long()
        return {"input_ids": self.tokens[i], "attention_mask": mask, "labels": self.labels[i]}


class Learner(LightningModule):
    """Trains any network on any of these data sets."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.net(*inputs, **named)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            return self(**batch).loss
        x, y = batch
        return F.cross_entropy(logits(self(x)), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def logits(output: Any) -> Tensor:
    """What a model returned, or what it holds under that name."""
    return output if isinstance(output, Tensor) else output.logits


# From transformers


def vit(attention: str) -> nn.Module:
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=10,
        attn_implementation=attention,
    )
    return transformers.ViTForImageClassification(config)


def resnet(activation: str) -> nn.Module:
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        hidden_act=activation,
        num_labels=10,
    )
    return transformers.ResNetForImageClassification(config)


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(
        image_size=8, num_channels=1, patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10
    )
    return transformers.ConvNextForImageClassification(config)


def bert(attention: str) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=17,
        pad_token_id=PADDING,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=10,
        attn_implementation=attention,
    )
    return transformers.BertForSequenceClassification(config)


def masked(model: nn.Module, tokens: Tensor) -> Any:
    """Calls a text model with the mask that its padding makes."""
    return model(input_ids=tokens, attention_mask=(tokens != PADDING).long())


def bert_after_embeddings(net: nn.Module, embedded: Tensor, tokens: Tensor) -> Tensor:
    """What BERT computes from its embeddings, put together by hand, with a mask made by hand."""
    hidden = torch.zeros(len(tokens), 1, 1, tokens.shape[1], dtype=embedded.dtype)
    hidden = hidden.masked_fill((tokens == PADDING)[:, None, None, :], torch.finfo(embedded.dtype).min)
    states = net.bert.encoder(embedded, hidden).last_hidden_state
    return net.classifier(net.bert.pooler(states))


# From torch


def cnn(activation: nn.Module, norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), norm, activation, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(36, 10)
    )


def plain_cnn() -> nn.Sequential:
    return cnn(nn.SiLU(), nn.Identity())


def compiled(net: nn.Module) -> Any:
    return torch.compile(net, backend="aot_eager")


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Recurrent(nn.Module):
    """An RNN over the rows of an image."""

    def __init__(self, kind: type[nn.RNNBase], **arguments: Any) -> None:
        super().__init__()
        self.body = kind(8, 8, batch_first=True, **arguments)
        self.head = nn.LazyLinear(10)
        self(torch.zeros(1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class OwnKernel(nn.Module):
    """Attention over rows that asks for a kernel without a second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            h = F.scaled_dot_product_attention(q, k, v)
        return self.head(torch.tanh(h.transpose(1, 2).flatten(2).mean(1)))


def normed() -> nn.Module:
    return nn.Sequential(
        weight_norm(nn.Conv2d(1, 4, 3)), nn.SiLU(), nn.Flatten(), spectral_norm(nn.Linear(144, 12)), nn.Tanh(),
        weight_norm(nn.Linear(12, 10)),
    )  # fmt: skip


def _uncheckpointed(body: nn.Module, h: Tensor, use_reentrant: bool) -> Tensor:
    return body(h)


class Checkpointed(nn.Module):
    """Recomputes its body in the backward pass, in eval mode too."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.reentrant = nn.Conv2d(1, 4, 3), reentrant
        self.body = nn.Sequential(nn.GELU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        run = checkpoint if torch.is_grad_enabled() else _uncheckpointed
        return self.head(run(self.body, h, use_reentrant=self.reentrant))


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


class Swish(nn.Module):
    """An activation as many repositories write it: an ``autograd.Function`` of the old form."""

    def forward(self, x: Tensor) -> Tensor:
        return _Swish.apply(x)


def _bent(x: Tensor) -> Tensor:
    return torch.tanh(x) * x


class Bent(nn.Module):
    """An activation that is a scripted function."""

    def __init__(self) -> None:
        super().__init__()
        self.bend = torch.jit.script(_bent)

    def forward(self, x: Tensor) -> Tensor:
        return self.bend(x)


class Casting(nn.Module):
    """Casts its input itself, so that it cannot be evaluated in float64."""

    def __init__(self, cast: bool = True) -> None:
        super().__init__()
        self.cast = cast
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float() if self.cast else x)


class InPlace(nn.Module):
    """Normalizes its input in place, and has activations that write to theirs."""

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.in_place = in_place
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(inplace=in_place), nn.Flatten(), nn.Linear(144, 10))

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_place:
            return self.net(2 * (x - 0.5))
        x -= 0.5
        return self.net(x.mul_(2))


class Forces(nn.Module):
    """Returns the gradient of an energy, for which it needs a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return -slope.flatten(1)[:, 20:30]


class Fourier(nn.Module):
    """A layer of a Fourier neural operator: complex weights of frequencies."""

    def __init__(self, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(5, 5, 5, dtype=dtype))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.einsum("nrf,frg->nrg", torch.fft.rfft2(x)[:, 0, :5], self.weights)
        return self.head(torch.tanh(torch.fft.irfft2(spectrum, s=(8, 8))).flatten(1))


class Moved(nn.Module):
    """Moves its network to where its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain_cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.net.to(x.device)(x)
