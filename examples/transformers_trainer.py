"""Watch input Hessians of a vision transformer in the Hugging Face Trainer, with a callback of ten lines.

A tiny ViT (built from a configuration, so nothing is downloaded) learns scikit-learn's 8x8 digits.

    python examples/transformers_trainer.py
"""

import argparse
import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from lightning_hessian import InputHessianRecorder


class InputHessianCallback(TrainerCallback):
    """Measures before training and after every epoch."""

    def __init__(self, recorder: InputHessianRecorder) -> None:
        self.recorder = recorder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step."""
        self.recorder.measure(kwargs["model"], state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the end of an epoch."""
        self.recorder.measure(kwargs["model"], state.global_step, epoch=round(state.epoch) - 1)


class Digits(Dataset):
    """Digits as transformers' image classifiers take them."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.x[i], "labels": self.y[i]}


def main() -> None:
    """Trains, measures, and says how to look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-dir", default="transformers_logs")
    args = parser.parse_args()

    set_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=10,
    )
    held_out = Digits(x[1500:], y[1500:])
    with (
        tempfile.TemporaryDirectory() as output,
        InputHessianRecorder(
            args.log_dir, samples=(held_out.x, held_out.y), classes="label", num_samples=4
        ) as recorder,
    ):
        trainer = Trainer(
            ViTForImageClassification(config),
            TrainingArguments(
                output, num_train_epochs=15, per_device_train_batch_size=32, learning_rate=3e-3, report_to="none",
                save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
            ),
            train_dataset=Digits(x[:1500], y[:1500]),
            callbacks=[InputHessianCallback(recorder)],
        )  # fmt: skip
        trainer.train()
        predicted = torch.tensor(trainer.predict(held_out).predictions).argmax(1)
    print(f"Held-out accuracy: {(predicted == held_out.y).float().mean():.1%}")
    print(f"To see the results: .venv/bin/tensorboard --logdir {args.log_dir}, then open the address that it prints")


if __name__ == "__main__":
    main()
