"""What the README's code takes for granted: a user's model and data (real digits, small)."""

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

images, labels = load_digits(return_X_y=True)
x = torch.tensor(images[:128], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
data = TensorDataset(x, torch.tensor(labels[:128]))
train_loader, val_loader = DataLoader(data, batch_size=32), DataLoader(data, batch_size=32)


class MyModel(LightningModule):
    """Anybody's classifier."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))

    def forward(self, x):
        """Logits."""
        return self.net(x)

    def training_step(self, batch, batch_idx):
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        """Cross-entropy."""
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        """Adam."""
        return torch.optim.Adam(self.parameters())
