"""What TensorBoard finds through the entry point: light, because an error while importing it would end TensorBoard."""

from __future__ import annotations

import argparse
import logging

from tensorboard.plugins import base_plugin

PLUGIN_NAME = "input_hessian"  # of event_format.py, which loads more than is good here
STEPS_KEPT = 1000  # per tag; TensorBoard alone would keep 10 or 100 of a run's measurements

logger = logging.getLogger("tensorboard")


class InputHessianLoader(base_plugin.TBLoader):  # type: ignore[misc] # TensorBoard has no types
    """Makes the plugin when TensorBoard starts."""

    def fix_flags(self, flags: argparse.Namespace) -> None:
        """Has TensorBoard keep up to 1000 measurements of each tag, unless ``--samples_per_plugin`` says otherwise."""
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(PLUGIN_NAME, STEPS_KEPT)

    def load(self, context: base_plugin.TBContext) -> base_plugin.TBPlugin | None:
        """The plugin, or None after saying why there is none."""
        try:
            from lightning_hessian.tensorboard_plugin.plugin import InputHessianPlugin

            return InputHessianPlugin(context)
        except Exception as error:
            logger.exception("There is no Input Hessian tab: %s: %s", type(error).__name__, error)
            return None
