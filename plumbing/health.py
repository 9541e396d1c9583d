"""The health of a training run: losses and gradients that are not finite, and ranks whose weights drift apart."""

import math

import torch

from plumbing import optim, processes
from plumbing.settings import InputError


class Health:
    """Notes the first update whose loss or gradient is NaN or infinite, on the device, where nothing waits for it.

    `check` reads the note at log lines and saves, so the run ends some updates later and still names the right one.
    Under float16 the scaler skips updates with infinite gradients. They are counted; below scale 1 they are broken."""

    def __init__(self, optimizer, scaler, device, skipped_updates=0):
        self.optimizer, self.scaler, self.skipped_updates = optimizer, scaler, skipped_updates
        self.scale = scaler.get_scale()  # 1.0 without a scaler
        self.note = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64, device=device)  # update, loss, gradient norm

    def watch(self, step, loss):
        """Look at update `step` (from 0) after the optimizer's step: at its loss () and at its gradients."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [] if self.scaler.is_enabled() else [p.grad for p in parameters]
        norm = torch.nn.utils.get_total_norm(gradients).to(loss.device)  # of nothing: 0
        before, self.scale = self.scale, self.scaler.get_scale()
        if self.scale < before:
            self.skipped_updates += 1
            norm = norm + (math.inf if before < 1 else 0.0)
        number = torch.full((), step, device=loss.device)
        row = torch.stack([value.to(self.note) for value in (number, loss.detach(), norm)])
        self.note = torch.where((self.note[0] < 0) & ~row.isfinite().all(), row, self.note)

    def check(self, config, sampler, name_of):
        """Raise InputError where an update was broken: its number, objective, learning rate and products."""
        broken = [row for row in processes.gather_objects(self.note.tolist()) if row[0] >= 0]
        if not broken:
            return
        step, loss, norm = min(broken, key=lambda row: row[0])
        _, rows, objective = sampler.update_at(int(step))
        lr = self.optimizer.param_groups[0]["base_lr"] * optim.lr_multiplier(step, config.warmup, config.milestones)
        raise InputError(
            f"update {int(step) + 1}: loss {loss:g}, gradient norm {norm:g} (objective {objective}, learning rate "
            f"{lr:.3g}); the last checkpoint is older and stays; lower --lr, or look at this update's products: "
            f"{', '.join(name_of(int(row)) for row in rows)}"
        )


def check_weights(model, done):
    """Before a validation or save: buffers of rank 0 for all. Raises InputError naming a rank that has drifted."""
    processes.copy_from_main(model.buffers())  # BatchNorm's averages, which each process moves by its own batch
    bits = 0  # one number of all bits of the float32 parameters
    for i, parameter in enumerate(model.parameters(), 1):
        bits = bits + i * parameter.detach().view(torch.int32).sum(dtype=torch.int64)
    cure = "the last checkpoint is from before it: --resume=auto, and suspect that rank's machine"
    processes.same_everywhere(f"after update {done} the weights' checksums differ", int(bits), cure)
