"""One resumable stage of training: :class:`Run`."""

import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from fp4dit_ao import _compat
from fp4dit_ao.util.atomic_files import write_text

SAVE_EVERY = 500
"""Steps between two saved states."""
EMA = 0.999
"""Decay per step of the exponential averages of the weights."""


class Run:
    """Model, exponential averages, optimizer and loss history of one stage, saved as safetensors and JSON for
    resuming."""

    def __init__(self, folder: Path, model: nn.Module, lr: float, weight_decay: float, seed: int):
        self.folder, self.model, self.lr, self.seed = folder, model, lr, seed
        self.params = dict(model.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.params.items()}
        fused = next(model.parameters()).is_cuda or None
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused
        )
        self.step, self.seconds = 0, 0.0
        self.loss = math.nan  # set by the training loop in every step
        self.smooth: float | None = None
        self.history: list[list[float]] = []
        if (folder / "state.json").exists():
            self._load()

    def _load(self) -> None:
        state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.smooth = state.get("smooth")
        tensors = load_file(self.folder / f"state-{self.step}.safetensors")
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(tensors[f"model.{name}"])
                self.ema[name] = tensors[f"ema.{name}"].to(p.device)
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.step), device=p.device),
                    "exp_avg": tensors[f"m.{name}"].to(p.device),
                    "exp_avg_sq": tensors[f"v.{name}"].to(p.device),
                }

    def save(self) -> None:
        """Writes the state, whole or not at all, and deletes older ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, p in self.params.items():
            state = self.optimizer.state[p]
            tensors |= {f"model.{name}": p.detach(), f"ema.{name}": self.ema[name]}
            tensors |= {f"m.{name}": state["exp_avg"], f"v.{name}": state["exp_avg_sq"]}
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.folder / f"state-{self.step}.safetensors")
        record: dict[str, object] = {
            "step": self.step,
            "seconds": self.seconds,
            "seed": self.seed,
            "smooth": self.smooth,
        }
        record |= {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        record |= {"history": self.history}
        write_text(self.folder / "state.json", json.dumps(record))
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != f"state-{self.step}.safetensors":
                old.unlink()

    def steps(self, total: int, decay: float) -> Iterator[torch.Generator]:
        """Yields a generator, seeded by the step, until ``total`` steps are done; applies the gradients after each
        yield.

        The learning rate warms up over 200 steps, stays constant, and falls linearly to zero over the last ``decay``
        fraction. The caller computes gradients and sets :attr:`loss` in every step.
        """
        bar = tqdm(total=total, initial=self.step, desc=self.folder.name, mininterval=5)
        while self.step < total:
            start = time.monotonic()
            rate = min(1.0, (self.step + 1) / 200, (total - self.step) / max(1, total * decay))
            yield torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
            self.update(rate)
            self.seconds += time.monotonic() - start
            self.smooth = self.loss if self.smooth is None else 0.98 * self.smooth + 0.02 * self.loss
            if self.step % 20 == 0:
                self.history.append([self.step, round(self.smooth, 5)])
            bar.set_postfix(loss=f"{self.smooth:.4f}", refresh=False)
            bar.update()
            if self.step % SAVE_EVERY == 0 or self.step == total:
                self.save()
        bar.close()

    def update(self, rate: float) -> None:
        """Applies the gradients at ``rate`` times the peak learning rate, and averages the weights."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        weight = 1 - min(EMA, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            _compat.lerp_(list(self.ema.values()), [p.detach() for p in self.params.values()], weight)

    def averaged(self) -> nn.Module:
        """Model with the averages in place of its weights, in eval mode."""
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(self.ema[name])
        return self.model.eval()
