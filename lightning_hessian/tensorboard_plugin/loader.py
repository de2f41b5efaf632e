"""The entry point that TensorBoard finds. It imports little, because an error in an import would end TensorBoard."""

from __future__ import annotations

import argparse
import logging

from tensorboard.plugins import base_plugin

PLUGIN_NAME = "input_hessian"  # as in event_format.py, which imports too much for this module
MAX_STEPS = 1000  # per tag; by default, TensorBoard retains only 10 or 100 of a run's measurements

logger = logging.getLogger("tensorboard")


class InputHessianLoader(base_plugin.TBLoader):  # type: ignore[misc] # TensorBoard has no types
    """Creates the plugin when TensorBoard starts."""

    def fix_flags(self, flags: argparse.Namespace) -> None:
        """Makes TensorBoard retain up to 1000 measurements of each tag, unless ``--samples_per_plugin`` is given."""
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(PLUGIN_NAME, MAX_STEPS)

    def load(self, context: base_plugin.TBContext) -> base_plugin.TBPlugin | None:
        """The plugin, or None after logging why there is none."""
        try:
            from lightning_hessian.tensorboard_plugin.plugin import InputHessianPlugin

            return InputHessianPlugin(context)
        except Exception as error:
            logger.exception("There is no Input Hessian tab: %s: %s", type(error).__name__, error)
            return None
