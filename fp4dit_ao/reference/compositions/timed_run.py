"""Training that ends well after a given time, however fast the machine is: :class:`TimedRun`."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fp4dit_ao.reference.training_run import Run

WARM_UP = 400
"""Steps in which the learning rate rises."""
DECAY = 0.6
"""Fraction of the time, at the end, in which it falls to zero."""
REPORT_EVERY = 100
"""Steps between two looks at the loss; each waits for the device."""


class TimedRun(Run):
    """A :class:`Run` on any device, with a schedule in seconds of all its sessions together."""

    def rate(self, seconds: float) -> float:
        """Learning rate now, relative to its peak: a linear rise in steps, a plateau, a cosine to zero in time."""
        left = max(0.0, 1 - self.seconds / seconds)
        return min(1.0, (self.step + 1) / WARM_UP) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left / DECAY)))

    def train_for(
        self,
        seconds: float,
        save_every: float,
        loss_of: Callable[[torch.Generator], Tensor],
        publish: Callable[[], None],
    ) -> None:
        """Trains until the run has taken ``seconds``, at least one step, saving every ``save_every`` seconds and at the end.

        The loss stays on the device and is read now and then. If it is no longer finite, training goes on from the last
        save at half the learning rate.

        Args:
            loss_of: computes the loss of one step from a generator on the model's device, seeded by the step.
            publish: called after every save.

        Raises:
            FloatingPointError: the loss is not finite, and nothing was saved yet.
        """
        generator = torch.Generator(next(self.model.parameters()).device)
        smooth = torch.tensor(self.smooth or 0.0, device=generator.device)
        weight = 0.02 if self.smooth else 1.0
        began, saved, reported, steps = time.monotonic() - self.seconds, self.seconds, time.monotonic(), self.step
        due = False
        while not (due and self.seconds >= seconds):
            loss = loss_of(generator.manual_seed(self.seed * 1_000_003 + self.step))
            loss.backward()
            self.update(self.rate(seconds))
            smooth.lerp_(loss.detach(), weight)
            weight = max(0.02, weight / (1 + weight))
            self.seconds = time.monotonic() - began
            due = self.seconds - saved >= save_every or self.seconds >= seconds
            if due or self.step % REPORT_EVERY == 0 or self.step == 1:
                self.smooth = float(smooth)
                now, count = time.monotonic(), self.step - steps
                print(
                    f"step {self.step}  {self.seconds:.0f} s  loss {self.smooth:.5f}  rate {self.rate(seconds):.3f}  "
                    f"{count / (now - reported):.2f} steps/s",
                    flush=True,
                )
                if not math.isfinite(self.smooth):
                    self._go_back(began)
                    smooth.fill_(self.smooth)
                self.history.append([self.step, round(self.smooth, 5)])
                reported, steps = time.monotonic(), self.step
            if due:
                self.save()
                publish()
                saved = self.seconds = time.monotonic() - began

    def _go_back(self, began: float) -> None:
        """Loads the last save and halves the learning rate."""
        if not (self.folder / "state.json").exists():
            raise FloatingPointError(f"the loss is {self.smooth} at step {self.step}; try a smaller learning rate")
        self.lr /= 2
        self._load()
        self.seconds = time.monotonic() - began
        print(f"back to step {self.step}, with a peak learning rate of {self.lr:g}", flush=True)
