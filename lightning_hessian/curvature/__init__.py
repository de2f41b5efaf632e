"""The numerics of input-Hessians, in pure torch: no module, Trainer, logger or picture is known here."""
