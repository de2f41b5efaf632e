"""The user's own charts in Custom scalars and ours are both shown, whoever writes last."""

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from support.training import Classifier, events, fit
from support.training import quick_monitor as quick
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

THEIRS = {"Mine": {"losses": ["Multiline", ["val_loss", "train_loss"]]}}
OURS = "Input Hessian"


def layouts(folder):
    """All layouts of a run, in the order in which they were written; TensorBoard shows the last one."""
    shown = events(folder).Tensors("custom_scalars__config__")
    return [layout_pb2.Layout.FromString(each.tensor_proto.string_val[0]) for each in shown]


def titles(folder):
    return [category.title.split(":")[0] for category in layouts(folder)[-1].category]


class Writes(Callback):
    """Writes a layout of the user's in one of Lightning's hooks."""

    def __init__(self, hook):
        def write(trainer, *arguments):
            trainer.logger.experiment.add_custom_scalars(THEIRS)

        setattr(self, hook, write)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_end", "on_train_end", "on_fit_end"])
def test_a_layout_that_another_callback_writes(tmp_path, hook, first):
    callbacks = [Writes(hook), quick()] if first else [quick(), Writes(hook)]
    fit(tmp_path, *callbacks, max_epochs=1)
    assert sorted(titles(tmp_path)) == [OURS, "Mine"]


def test_a_layout_that_was_written_before_the_fit(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    logger.experiment.add_custom_scalars(THEIRS)
    fit(tmp_path, quick(), quick(name="other"), logger=logger, max_epochs=1)
    assert sorted(titles(tmp_path)) == [OURS, "Input Hessian other", "Mine"]
    (mine,) = (c for c in layouts(tmp_path)[-1].category if c.title == "Mine")
    assert list(mine.chart[0].multiline.tag) == ["val_loss", "train_loss"]


def test_a_layout_in_an_earlier_event_file(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.add_custom_scalars_multilinechart(["val_loss"], "Mine", "one")
    fit(tmp_path, quick(), max_epochs=1)
    assert titles(tmp_path) == ["Mine", OURS]


def test_the_users_last_layout_replaces_his_first(tmp_path):
    class Twice(Classifier):
        def on_train_epoch_end(self):
            self.logger.experiment.add_custom_scalars({f"Mine {self.current_epoch}": THEIRS["Mine"]})

    fit(tmp_path, quick(), model=Twice())
    assert sorted(titles(tmp_path)) == [OURS, "Mine 1"]


def test_nothing_is_written_again_where_nothing_was_replaced(tmp_path):
    fit(tmp_path, quick())
    assert len(layouts(tmp_path)) == 1
    fit(tmp_path, quick())  # a new event file of the same run
    assert len(layouts(tmp_path)) == 1
