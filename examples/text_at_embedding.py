"""Which words of a text interact? A text classifier, measured at its embedding.

Tokens are integers, so there is no derivative with respect to them, and the monitor measures at the layer that embeds
them: ``wrt="embedding"``. The Hessian of 16 words with 8-dimensional embeddings is 128x128; its block (i, j) says how
the effect of word i on the output changes with word j.

    python examples/text_at_embedding.py

The text is real, if not literature: docstrings of NumPy and PyTorch, cut into passages of 16 words. The classifier
predicts which package a passage comes from; all passages of a docstring are either training or held-out data. You will
see three held-out passages and, for each, the three pairs of different words with the largest blocks. They depend on
the installed versions of both packages.
"""

import argparse
import inspect
import re
from collections import Counter

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import InputHessianMonitor, load_records

SOURCES = {"numpy": (np, np.linalg, np.fft, np.random), "torch": (torch, torch.linalg, torch.fft, nn.functional)}
NUM_WORDS, VOCABULARY, WIDTH = 16, 1500, 8
GIVEAWAYS = {"numpy", "np", "torch", "pytorch", "tensor", "tensors", "ndarray", "ndarrays"}  # too easy


def passages() -> tuple[list[list[str]], list[int], list[bool]]:
    """Words of each passage, its source (0 or 1), and whether it is held out."""
    words, sources, held_out = [], [], []
    for source, modules in enumerate(SOURCES.values()):
        texts = {inspect.getdoc(getattr(m, name)) or "" for m in modules for name in dir(m) if name[0] != "_"}
        for number, text in enumerate(sorted(texts)):
            of_text = [w for w in re.findall(r"[a-z]{2,}", text.lower()) if w not in GIVEAWAYS]
            for start in range(0, min(len(of_text), 200) - NUM_WORDS + 1, NUM_WORDS):
                words.append(of_text[start : start + NUM_WORDS])
                sources.append(source)
                held_out.append(number % 5 == 0)
    return words, sources, held_out


class TextClassifier(LightningModule):
    """Embedding, one layer of attention, the mean over the passage, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = nn.TransformerEncoderLayer(
            WIDTH, nhead=2, dim_feedforward=32, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[N, 2]`` of tokens ``[N, 16]``."""
        return self.head(self.attention(self.embedding(tokens)).mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy on the held-out passages."""
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def interactions(hessian: np.ndarray) -> np.ndarray:
    """Frobenius norm of each block of two words, ``[16, 16]``."""
    return np.linalg.norm(hessian.reshape(NUM_WORDS, WIDTH, NUM_WORDS, WIDTH), axis=(1, 3))


def strongest(passage: list[str], blocks: np.ndarray) -> list[tuple[tuple[str, str], float]]:
    """The three pairs of different words with the largest blocks."""
    pairs: dict[tuple[str, str], float] = {}
    for i, j in zip(*np.triu_indices(NUM_WORDS, k=1), strict=True):
        if passage[i] != passage[j]:
            pair = min((passage[i], passage[j]), (passage[j], passage[i]))  # both may occur several times
            pairs[pair] = max(pairs.get(pair, 0.0), float(blocks[i, j]))
    return sorted(pairs.items(), key=lambda pair: -pair[1])[:3]


def main() -> None:
    """Trains, measures, and prints the pairs of words that interact most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-dir", default="text_logs")
    args = parser.parse_args()

    seed_everything(0, verbose=False)
    words, sources, is_held_out = passages()
    common = Counter(w for passage, out in zip(words, is_held_out, strict=True) if not out for w in passage)
    number = {word: i for i, (word, _) in enumerate(common.most_common(VOCABULARY - 1), start=1)}  # 0: any other word
    tokens = torch.tensor([[number.get(word, 0) for word in passage] for passage in words])
    y, out = torch.tensor(sources), torch.tensor(is_held_out)
    chosen = out.nonzero()[:: int(out.sum()) // 3][:3, 0]  # three held-out passages, from both sources
    trainer = Trainer(
        max_epochs=6,
        logger=TensorBoardLogger(args.log_dir),
        callbacks=[
            InputHessianMonitor(
                classes="label", target="logit", wrt="embedding", samples=(tokens[chosen], y[chosen]), heatmap_samples=3
            )
        ],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train, held_out = TensorDataset(tokens[~out], y[~out]), TensorDataset(tokens[out], y[out])
    trainer.fit(TextClassifier(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=1000))

    record = load_records(trainer.log_dir)[-1]
    for sample, passage in enumerate(chosen.tolist()):
        print(f"\n{list(SOURCES)[sources[passage]]}: {' '.join(words[passage])}")
        for (first, second), size in strongest(words[passage], interactions(record.matrix(sample))):
            print(f"  {first} - {second}: {size:.3g}")
    print(
        f"\n{int((~out).sum())} passages to train on. Held-out accuracy: {trainer.callback_metrics['val_accuracy']:.1%}"
    )
    print(f"To see the results: .venv/bin/tensorboard --logdir {args.log_dir}, then open the address that it prints")


if __name__ == "__main__":
    main()
