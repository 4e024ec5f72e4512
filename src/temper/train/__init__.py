"""The training loop, its optimiser and schedules. Floor 3."""

from temper.train.compute import Compute
from temper.train.fit import Loss, State, Step, Term, TrainingError, fit
from temper.train.optim import Optim, lr_at, optimizer

__all__ = ["Compute", "Loss", "Optim", "State", "Step", "Term", "TrainingError", "fit", "lr_at", "optimizer"]
